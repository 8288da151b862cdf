"""What can be measured of a model of transformers that is split in place, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.any_model.in_place import InPlaceModel
from colrow.any_model.loading import split_in_place
from colrow.bench.result import BenchSettings
from colrow.bench.subjects import Subject, part_training, random_tokens, whole_model
from colrow.comm.mesh import Mesh
from colrow.inplace.weights.meta import random_model

# What the modules of a block that do this have in their names.
_NAMES = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "moe")}


def in_place_subjects(settings: BenchSettings, mesh: Mesh) -> list[Subject]:
    """The whole model, its first block, or the one attention or MLP module of that.

    Raises:
        ValueError: what is asked for is no module of the block; says which there are.
    """
    if settings.what != "model" and (settings.decode or settings.sequence_parallel):
        raise ValueError(
            f"--what {settings.what} of a model that is split in place runs forward and backward "
            "of whole sequences: use --what model with --decode or --sequence-parallel"
        )
    dtype: torch.dtype = getattr(torch, settings.dtype)
    module = random_model(settings.in_place, dtype, 0).to(mesh.device)
    model = split_in_place(module, mesh, sequence_parallel=settings.sequence_parallel)
    model.module.train(not settings.decode)
    if settings.decode:
        model.for_decoding()
    if settings.what == "model":
        return [whole_model(model, settings)]
    return [_part(model, _module_of(model, settings.what), settings)]


def _module_of(model: InPlaceModel, what: str) -> nn.Module:
    block = model.blocks[0]
    if what == "block":
        return block
    names = [
        name for name, child in block.named_children() if any(True for _ in child.parameters())
    ]
    wanted = [
        name
        for name in names
        if any(part in name for part in _NAMES.get(what, ())) and "norm" not in name
    ]
    if len(wanted) != 1:
        raise ValueError(
            f"--what {what}: {type(block).__name__} of this {model.description.name} has no one "
            f"module for it, but {', '.join(names)}: use --what block or model"
        )
    return block.get_submodule(wanted[0])


def _part(model: InPlaceModel, part: nn.Module, settings: BenchSettings) -> Subject:
    """A module with what the model calls it with for random tokens."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))

    handle = part.register_forward_pre_hook(keep, with_kwargs=True)
    ids = random_tokens(model, settings)
    with torch.no_grad(), model.arithmetic():
        model.loss(ids, ids)
    handle.remove()
    model.module.check_inputs = False  # type: ignore[assignment]
    args, kwargs = pytree.tree_map(_own, given[0])
    x = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if _flows(leaf)).requires_grad_()

    def run() -> Tensor:
        with model.arithmetic():
            result = part(*args, **kwargs)
        found: Tensor = next(leaf for leaf in pytree.tree_leaves(result) if _flows(leaf))
        return found

    return part_training(settings.what, part, x, run, ids.numel())


def _own(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _flows(leaf: Any) -> bool:
    """Whether it is activations, ``[batch, sequence, features]`` or ``[tokens, features]``."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() in (2, 3)
