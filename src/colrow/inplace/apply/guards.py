"""Modules that hold a divided parameter and were not seen running, and readers of such parameters.

A parameter is divided for the modules that the sample batch called. Another module may hold it too,
by tying: the head of another mode, or the embedding that LoRA has set aside for when its adapters
are off. Such a layer is split like one that was called; what cannot be is refused when it is used.
Code that reads the weight of a divided layer itself would get a shard: it gets a tensor that tells
its dtype and device, and refuses to be computed with, but for being scaled.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.layers import (
    ColumnMixin,
    EmbeddingMixin,
    GatheredMixin,
    HeadMixin,
    RowMixin,
)
from colrow.inplace.apply.pairs import Pair
from colrow.inplace.apply.record import REACH_IT
from colrow.inplace.apply.whole_results import split_linear, split_table
from colrow.inplace.observe.calls import full_name
from colrow.inplace.observe.linear_layers import linear_kind, output_dim, plain_table
from colrow.partition import ShardSpec

_FRAMES = 8

# Methods of these files hand parameters on to whoever asks, or move them.
_KEEPERS = ("torch/nn/modules/module.py", "transformers/modeling_utils.py")

# PEFT's, which choose what is trained.
_CHOOSERS = ("set_adapter", "enable_adapters", "set_requires_grad", "delete_adapter")


def guard_unseen(applier: Applier) -> None:
    """Splits or refuses every module that holds a divided parameter and is not split itself."""
    for name, module in list(applier.model.named_modules()):
        held = {
            last: spec
            for last, parameter in module._parameters.items()
            if parameter is not None and not applier.expects_shard(module, last)
            if (spec := applier.spec_of(parameter)) is not None
        }
        if not held or _split_alike(applier, name, module, held):
            continue
        if not isinstance(module, nn.Linear | nn.Embedding | _ConvNd) and not linear_kind(module):
            _guard(applier, name, module, frozenset(held))
        else:
            last = next(iter(held))
            full = full_name(name, last)
            others = [other for other in applier.names_of(module, last) if other != full]
            applier.attach(module, "colrow_refused", (full, others))
            applier.change_class(module, RefusedMixin)
    for name, module in applier.model.named_modules():
        if isinstance(module, _LAYERS):
            _guard(applier, name, module, frozenset({"weight", "bias"}), own=True)
    for owner, names, pair in applier.used_directly.values():
        _guard(applier, applier.paths[id(owner)], owner, frozenset(names), pair=pair)


def _guard(
    applier: Applier,
    name: str,
    module: nn.Module,
    names: frozenset[str],
    *,
    own: bool = False,
    pair: Pair | None = None,
) -> None:
    if "colrow_guard" not in module.__dict__:
        applier.attach(module, "colrow_guard", Guard(name, applier.members, names, own, pair))
        applier.change_class(module, GuardMixin)


def _split_alike(
    applier: Applier, name: str, module: nn.Module, held: dict[str, ShardSpec]
) -> bool:
    """Splits a layer whose weight is divided by output features or rows of a table."""
    kind, spec = linear_kind(module), held.get("weight")
    if spec is None or len(spec.blocks) != 1 or spec.blocks[0].shared:
        return False
    if isinstance(module, nn.Embedding):
        if spec.dim != 0 or not plain_table(module) or not _asks_its_base(module):
            return False
        split_table(applier, name, module)
        return True
    if kind is None or spec.dim != output_dim(kind):
        return False
    split_linear(applier, name, module, spec.blocks[0])
    return True


def _asks_its_base(module: nn.Embedding) -> bool:
    """Whether an embedding looks its vectors up with nn.Embedding's own forward and no other way.

    Tried with a table of which the module holds nothing: what it does with the vectors is its own.
    """
    if type(module).forward is nn.Embedding.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, module.embedding_dim, generator=generator)
    ids = torch.tensor([[0, 1], [4, 2]])

    class Asked(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return F.embedding(input, table)

    def result(weight: Tensor, *bases: type) -> Tensor:
        twin = copy.copy(module)
        parameters = module._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
        twin.__dict__["_parameters"] = parameters
        for number in ("num_embeddings", "padding_idx"):
            twin.__dict__[number] = 5 if number == "num_embeddings" else None
        twin.__class__ = type(type(module).__name__, (type(module), *bases), {})
        found: Tensor = type(twin).forward(twin, ids)
        return found

    try:
        return torch.equal(result(table), result(table[:1] + 1, Asked))
    except Exception:  # whatever its code raises
        return False


class RefusedMixin(nn.Module):
    """A module that holds a divided parameter and does not know it."""

    colrow_refused: tuple[str, list[str]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: what it would compute is wrong."""
        name, others = self.colrow_refused
        shared = f", which it shares with {others[0]}," if others else ""
        raise ValueError(
            f"{name}{shared} is divided over the ranks, but its module was not seen running when "
            f"the model was split; {REACH_IT}"
        )


@dataclass(frozen=True)
class Guard:
    """Whose divided parameters may be read by whom.

    Attributes:
        layer: the name of the module that holds them.
        members: the ids of all modules of the model; other code reads what it likes.
        names: the parameters.
        own: whether the module itself may read them.
        pair: inside its module's forward anybody may; None for no such module.
    """

    layer: str
    members: frozenset[int]
    names: frozenset[str]
    own: bool
    pair: Pair | None

    def refuses(self, holder: nn.Module, frame: FrameType | None) -> bool:
        """Whether the code of this frame may not read a parameter of ``holder``."""
        if self.pair is not None and (self.pair.inside or not self.pair.module):
            return False
        for _ in range(_FRAMES):
            if frame is None:
                return False
            reader = frame.f_locals.get("self")
            if isinstance(reader, nn.Module):
                code = frame.f_code
                if code.co_filename.endswith(_KEEPERS) or code.co_name in _CHOOSERS:
                    return False
                if reader is holder:
                    if self.own:
                        return False
                    if isinstance(holder, nn.ParameterDict | nn.ParameterList):
                        frame = frame.f_back
                        continue
                known = "colrow_adapted" in reader.__dict__
                return id(reader) in self.members and not known
            frame = frame.f_back
        return False


class GuardMixin(nn.Module):
    """A module whose divided parameters are for its own forward only, or for another module's."""

    colrow_guard: Guard

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if torch.compiler.is_compiling() or id((frame := sys._getframe(1)).f_code) in _OWN:
            return value
        guard: Guard | None = self.__dict__.get("colrow_guard")
        if guard is None or value is None or name not in guard.names:
            return value
        if not guard.refuses(self, frame):
            return value
        return _Unread.of(value, f"{guard.layer}.{name}" if guard.layer else name)


_LAYERS = (ColumnMixin, RowMixin, GatheredMixin, HeadMixin, EmbeddingMixin, RefusedMixin)

# By id, since this is asked for every weight in every pass, and a code's hash reads all of it.
_OWN = {id(layer.forward.__code__) for layer in _LAYERS}


class _Unread(Tensor):
    """A shard that is read by code that takes it for the whole."""

    colrow_name: str

    @classmethod
    def of(cls, shard: Tensor, name: str) -> Tensor:
        """Tells what the shard is of, and refuses to be computed with."""
        unread = shard.detach().as_subclass(cls)
        unread.colrow_name = name
        return unread

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The tensor's own answer about itself, and for anything else a ValueError."""
        leaves = pytree.tree_leaves((args, kwargs or {}))
        scales = func in _SCALES and all(isinstance(x, int | float) for x in leaves[1:])
        if scales or func in _DESCRIBES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = next((x.colrow_name for x in leaves if isinstance(x, cls)), "a weight")
        raise ValueError(
            f"{name} is divided over the ranks, and code that is not its layer's own computes with "
            f"it ({getattr(func, '__name__', func)}); {REACH_IT}"
        )


# With numbers, these do to a shard what they do to the whole.
_SCALES: frozenset[Any] = frozenset({Tensor.mul_, Tensor.div_, Tensor.zero_, Tensor.fill_})
_GETTERS = (
    *("dtype", "device", "layout", "shape", "ndim", "itemsize", "requires_grad", "is_leaf"),
    *("is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mkldnn"),
)

_DESCRIBES: frozenset[Any] = frozenset(getattr(Tensor, name).__get__ for name in _GETTERS) | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.element_size,
}
