"""What optimisers that look at whole tensors share: which those are, and their steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.checkpoint.whole_tensors import WholeTensor, decoders_tensors
from colrow.comm.agreement import require_same
from colrow.comm.compat import local_tensor
from colrow.comm.group import ParallelGroup
from colrow.partition import ShardSpec
from colrow.shards.boxes import (
    Placement,
    placements,
    tensor_parallel_group,
    unwrap,
)
from colrow.shards.model_shards import shards_of
from colrow.shards.optimizers import RightOnShards


@dataclass(frozen=True)
class Member:
    """A parameter and the whole tensors that it consists of.

    Attributes:
        name: in the module.
        place: what this rank holds of it.
        tensors: side by side in it.
    """

    name: str
    place: Placement
    tensors: tuple[WholeTensor, ...]


def members(module: nn.Module, parameters: Iterable[Tensor], optimizer: str) -> dict[int, Member]:
    """The module's parameters among these, by id.

    Args:
        optimizer: whose they are, for the message.

    Raises:
        ValueError: a parameter that is not one of the module's.
    """
    module = unwrap(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places, tensors = placements(module), decoders_tensors(module)
    whole = _split_in_place(module)
    found = {}
    for parameter in parameters:
        name = names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"{optimizer} was given a parameter of shape {tuple(parameter.shape)} that is not "
                "one of the model's: make the optimiser after the model was split and wrapped"
            )
        place = places[name]
        own = tensors.get(name) or _blocks(name, place.spec, name in whole)
        found[id(parameter)] = Member(name, place, own)
    return found


def check_same_have_gradients(parameters: Sequence[Tensor], tp: ParallelGroup, layer: str) -> None:
    """Makes sure that the same parameters have gradients on all tp ranks, which send for each.

    Args:
        layer: for the ledger.

    Raises:
        ValueError: on every rank, when they differ.

    Communicates: one all-reduce of 16 bytes.
    """
    if parameters:
        require_same(
            rng.stream_key(0, *(p.grad is not None for p in parameters)),
            tp,
            f"the ranks of this {tp.name} group have gradients for different parameters: give "
            "every rank of a group the same batch",
            layer=layer,
            device=local_tensor(parameters[0]).device,
        )


class WholeTensorOptimizer(RightOnShards, torch.optim.Optimizer):
    """An optimiser that looks at whole tensors, of which a module's parameters are parts.

    Attributes:
        label: its name, for messages and the ledger.
    """

    label: ClassVar[str]

    def __init__(self, params: Iterable[Any], module: nn.Module, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._module = module
        self._shapes: list[torch.Size] = []
        self._examine()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient; all ranks of tp and FSDP2 take part.

        Raises:
            ValueError: tp ranks that have gradients for different parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._examine()
        tp = tensor_parallel_group(self._module)
        check_same_have_gradients(self._parameters(), tp, self.label.lower())
        self._move()
        return loss

    def _move(self) -> None:
        """Updates them."""
        raise NotImplementedError

    def _take(self, members: dict[int, Member]) -> None:
        """What the parameters are parts of, by their ids."""
        raise NotImplementedError

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _examine(self) -> None:
        """Finds out, where parameters are new or have been divided since, what they are part of."""
        parameters = self._parameters()
        shapes = [p.shape for p in parameters]
        if shapes != self._shapes:
            self._take(members(self._module, parameters, f"colrow.{self.label}"))
            self._shapes = shapes


def _blocks(name: str, spec: ShardSpec, in_place: bool) -> tuple[WholeTensor, ...]:
    """A parameter of any other module: colrow's fused layers hold a matrix in each block."""
    if in_place or spec.dim is None or len(spec.blocks) == 1:
        return (WholeTensor(name, spec.shape),)
    found, start = [], 0
    for number, block in enumerate(spec.blocks):
        shape = (*spec.shape[: spec.dim], block.length, *spec.shape[spec.dim + 1 :])
        bands = ((start, start + block.length, 0),)
        found.append(WholeTensor(f"{name}[{number}]", shape, bands, spec.dim))
        start += block.length
    return tuple(found)


def _split_in_place(module: nn.Module) -> set[str]:
    """Names of the parameters that :func:`colrow.parallelize` divided."""
    found = set()
    for prefix, child in module.named_modules():
        shards = shards_of(child)
        for name in shards.specs if shards is not None else ():
            found.add(f"{prefix}.{name}" if prefix else name)
    return found
