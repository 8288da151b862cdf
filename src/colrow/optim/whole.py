"""The whole tensors that divided parameters are parts of, as the whole model has them.

An optimiser that looks at a whole matrix must look at the matrix of the published checkpoint. The
decoder keeps Q, K and V in one parameter where most checkpoints have three, and some families store
a matrix transposed or with its rows in another order; a model that was split in place has the whole
model's parameters under their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.checkpoint.naming import hf_naming, pieces
from colrow.checkpoint.training_placement import (
    Placement,
    local_tensor,
    placements,
    tensor_parallel_group,
    unwrap,
)
from colrow.comm.agreement import require_same
from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.record import record_of
from colrow.models.decoder import Decoder
from colrow.partition import Partition, ShardSpec

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """A rectangle of a whole tensor, in a rank's local tensor.

    Attributes:
        local: where it is there.
        whole: where it is in the whole tensor.
        transposed: the one is the other's transpose.
    """

    local: Slices
    whole: Slices
    transposed: bool

    def view(self, local: Tensor) -> Tensor:
        """The part in the local tensor, the way the whole tensor has it."""
        found = local[self.local]
        return found.t() if self.transposed else found

    @property
    def shape(self) -> tuple[int, ...]:
        """The way the whole tensor has it."""
        return tuple(s.stop - s.start for s in self.whole)


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of the whole model that is, or is a part of, one of this module's parameters.

    Attributes:
        name: of it.
        shape: of it.
        bands: ``(start, stop, at)``: indices of the parameter along ``dim`` that lie in one piece
            in this tensor, and where that begins; all of them by default.
        dim: the parameter's dimension that is divided.
        transposed: the parameter is stored as its transpose.
    """

    name: str
    shape: tuple[int, ...]
    bands: tuple[tuple[int, int, int], ...] = ()
    dim: int = 0
    transposed: bool = False

    def parts(self, place: Placement, *, owned: bool) -> tuple[Part, ...]:
        """What a rank with this placement of the parameter holds of it.

        Args:
            owned: without what a lower tp rank holds too.
        """
        found = []
        for box in place.owned if owned else place.boxes:
            first = box.offsets[self.dim] if self.bands else 0
            last = first + box.sizes[self.dim] if self.bands else 0
            for start, stop, at in self.bands or ((0, 0, 0),):
                offsets, sizes, local = map(list, (box.offsets, box.sizes, box.local_offsets))
                if self.bands:
                    low, high = max(first, start), min(last, stop)
                    if low >= high:
                        continue
                    local[self.dim] += low - first
                    offsets[self.dim], sizes[self.dim] = at + low - start, high - low
                whole = _slices(offsets, sizes)
                if self.transposed:
                    whole = whole[::-1]
                found.append(Part(_slices(local, sizes), whole, self.transposed))
        return tuple(found)


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
    places, tensors = placements(module), _decoders(module)
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


class WholeTensorOptimizer(torch.optim.Optimizer):
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


def _decoders(module: nn.Module) -> dict[str, tuple[WholeTensor, ...]]:
    """Those of every decoder inside ``module``, by the parameter's name."""
    found = {}
    for prefix, child in module.named_modules():
        if not isinstance(child, Decoder):
            continue
        naming = hf_naming(child.config)
        for name, spec in child.specs.items():
            blocks = tuple(Partition.even(block.length, 1) for block in spec.blocks)
            known: dict[str, WholeTensor] = {}
            for piece in pieces(naming, child.config, name, replace(spec, blocks=blocks), 0):
                bands, start = [], piece.target[0]
                for first, last in piece.ranges:
                    bands.append((start, start + last - first, first))
                    start += last - first
                before = known.get(piece.name)
                known[piece.name] = WholeTensor(
                    piece.name,
                    piece.shape,
                    (*(before.bands if before else ()), *bands),
                    spec.dim or 0,
                    piece.transposed,
                )
            found[f"{prefix}.{name}" if prefix else name] = tuple(known.values())
    return found


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
        record = record_of(child)
        for name in record.specs if record is not None else ():
            found.add(f"{prefix}.{name}" if prefix else name)
    return found


def _slices(offsets: list[int], sizes: list[int]) -> Slices:
    return tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
