"""Which blocks the flat pass for one token is written out for; any other takes the ordinary way.

A module is known by its exact class with that class's own forward, by the names of everything that
it holds, and by the values that the flat pass takes for granted. What is not named here is unknown.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from colrow.layers.activation import ACTIVATIONS
from colrow.layers.attention import ParallelAttention
from colrow.layers.block import ParallelBlock
from colrow.layers.column import ColumnParallelLinear, GateUpParallelLinear, QKVParallelLinear
from colrow.layers.decoding import BlasKernel, Kernel, PackedKernel, QuantisedKernel
from colrow.layers.dropout import ParallelDropout
from colrow.layers.grouped_query import group_sizes
from colrow.layers.mlp import ParallelMLP
from colrow.layers.norm import LayerNorm, RMSNorm
from colrow.layers.options import RopeConfig
from colrow.layers.quantised import QuantisedWeight
from colrow.layers.row import RowParallelLinear
from colrow.models.pipeline import Blocks


@dataclass(frozen=True)
class _Kind:
    """What a module of one class holds.

    Attributes:
        attributes: names beside those of every module; parameters, buffers and children too.
        children: the classes that each child may have.
        optional: children that may be missing: None is in their place.
        fits: whether the values are those that the flat pass knows.
    """

    attributes: frozenset[str]
    children: dict[str, tuple[type[nn.Module], ...]]
    fits: Callable[[Any], bool]
    forward: Any
    optional: frozenset[str] = frozenset()


def _kind(
    cls: type[nn.Module],
    attributes: str,
    fits: Callable[[Any], bool],
    **children: type[nn.Module] | tuple[type[nn.Module], ...],
) -> _Kind:
    found = {k: v if isinstance(v, tuple) else (v,) for k, v in children.items()}
    return _Kind(frozenset([*attributes.split(), *found]), found, fits, cls.forward)


def _block_fits(block: ParallelBlock) -> bool:
    serial_or_parallel = type(block.parallel_residual) is bool
    plain = block.one_norm is False and block.residual_scale == 1
    return serial_or_parallel and plain and block.compute_dtype is None


def _attention_fits(attention: ParallelAttention) -> bool:
    inner = group_sizes(attention.runs)[1:-1]
    return (
        type(attention.rope) in (RopeConfig, type(None))
        and attention.window is None
        and attention.scale is None
        and attention.softcap is None
        and attention.sinks is None
        and attention.alibi is False
        and attention.query_norm is None
        and attention.key_norm is None
        and attention.slopes is None
        and attention.sequence_parallel is False
        and all(size == max(group_sizes(attention.runs)) for size in inner)
    )


def _linear_fits(layer: Any) -> bool:
    kernels = (type(None), Kernel, BlasKernel, PackedKernel, QuantisedKernel)
    return layer.sequence_parallel is False and type(layer.kernel) in kernels


def _column_fits(layer: Any) -> bool:
    return _linear_fits(layer) and layer.gather_output is False


def _row_fits(layer: Any) -> bool:
    return _linear_fits(layer) and layer.input_is_parallel is True


def _norm_fits(norm: Any) -> bool:
    return norm.applied_to == "all" and norm.centred is False and norm.wide is False


def _mlp_fits(mlp: ParallelMLP) -> bool:
    return mlp.activation in ACTIVATIONS and type(mlp.gated) is bool


_DESCRIBED = "weight bias weight_spec bias_spec tp layer _shared_rows"
_LINEAR = f"{_DESCRIBED} in_features out_features sharding kernel"
_NORM = f"{_DESCRIBED} size eps applied_to centred wide"
_NORMS = (RMSNorm, LayerNorm)

_KINDS: dict[type[nn.Module], _Kind] = {
    ParallelBlock: _kind(
        ParallelBlock,
        "tp sharding parallel_residual one_norm residual_scale own_bucket compute_dtype recompute "
        "_shared_layers attention_post_norm mlp_post_norm",
        _block_fits,
        attention_norm=_NORMS,
        attention=ParallelAttention,
        mlp_norm=_NORMS,
        mlp=ParallelMLP,
        dropout=ParallelDropout,
    ),
    ParallelAttention: _kind(
        ParallelAttention,
        "heads head_dim tp rope scale softcap sinks window layer_index sharding prefix q_heads "
        "kv_heads runs alibi query_norm key_norm _shared_layers padded unpadded slopes frequencies",
        _attention_fits,
        qkv=QKVParallelLinear,
        output=RowParallelLinear,
        dropout=ParallelDropout,
    ),
    ParallelMLP: _kind(
        ParallelMLP,
        "activation gated partition sharding",
        _mlp_fits,
        up=(GateUpParallelLinear, ColumnParallelLinear),
        down=RowParallelLinear,
    ),
    QKVParallelLinear: _kind(QKVParallelLinear, _LINEAR, _linear_fits),
    GateUpParallelLinear: _kind(GateUpParallelLinear, _LINEAR, _linear_fits),
    ColumnParallelLinear: _kind(
        ColumnParallelLinear, f"{_LINEAR} partition gather_output", _column_fits
    ),
    RowParallelLinear: _kind(
        RowParallelLinear, f"{_LINEAR} partition input_is_parallel", _row_fits
    ),
    RMSNorm: _kind(RMSNorm, _NORM, _norm_fits),
    LayerNorm: _kind(LayerNorm, _NORM, _norm_fits),
    ParallelDropout: _kind(ParallelDropout, "p", lambda _: True),
}


def _quantised_block_fits(block: ParallelBlock) -> bool:
    return _block_fits(block) and block.parallel_residual is False


def _quantised_attention_fits(attention: ParallelAttention) -> bool:
    inner = group_sizes(attention.runs)[1:-1]
    return (
        (attention.rope is None or type(attention.rope) is RopeConfig)
        and not (attention.rope is not None and attention.rope.by_length)
        and (attention.softcap is None or type(attention.softcap) is float)
        and attention.sinks is None
        and (attention.window is None or type(attention.window) is int)
        and (attention.scale is None or type(attention.scale) is float)
        and attention.alibi is False
        and attention.slopes is None
        and attention.sequence_parallel is False
        and all(size == max(group_sizes(attention.runs)) for size in inner)
    )


def _quantised_linear_fits(layer: Any) -> bool:
    quantised = type(layer.kernel) is QuantisedKernel and type(layer.weight) is QuantisedWeight
    return quantised and layer.sequence_parallel is False


def _quantised_row_fits(layer: Any) -> bool:
    return _quantised_linear_fits(layer) and layer.input_is_parallel is True


def _quantised_norm_fits(norm: Any) -> bool:
    return type(norm.centred) is bool and type(norm.wide) is bool


def _quantised_mlp_fits(mlp: ParallelMLP) -> bool:
    return mlp.activation in ("silu", "gelu_tanh") and mlp.gated is True


_BLOCK_NORMS = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
_HEAD_NORMS = ("query_norm", "key_norm")


def _with_norms(kind: _Kind, names: tuple[str, ...], fits: Callable[[Any], bool]) -> _Kind:
    """The same kind with RMS norms of these names, each of which may be missing."""
    norms: dict[str, tuple[type[nn.Module], ...]] = dict.fromkeys(names, (RMSNorm,))
    children, optional = {**kind.children, **norms}, frozenset(names)
    return replace(kind, children=children, fits=fits, optional=optional)


_QUANTISED: dict[type[nn.Module], _Kind] = {
    ParallelBlock: _with_norms(_KINDS[ParallelBlock], _BLOCK_NORMS, _quantised_block_fits),
    ParallelAttention: _with_norms(
        _KINDS[ParallelAttention], _HEAD_NORMS, _quantised_attention_fits
    ),
    ParallelMLP: replace(
        _KINDS[ParallelMLP],
        children={"up": (GateUpParallelLinear,), "down": (RowParallelLinear,)},
        fits=_quantised_mlp_fits,
    ),
    QKVParallelLinear: replace(_KINDS[QKVParallelLinear], fits=_quantised_linear_fits),
    GateUpParallelLinear: replace(_KINDS[GateUpParallelLinear], fits=_quantised_linear_fits),
    RowParallelLinear: replace(_KINDS[RowParallelLinear], fits=_quantised_row_fits),
    RMSNorm: replace(_KINDS[RMSNorm], fits=_quantised_norm_fits),
    ParallelDropout: _KINDS[ParallelDropout],
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def known(block: nn.Module | None) -> bool:
    """Whether a block is one that the flat pass is written out for, as it is now."""
    return type(block) is ParallelBlock and _known(block, _KINDS)


def known_quantised(block: nn.Module | None) -> bool:
    """The same for the pass of blocks whose weights stay quantised."""
    return type(block) is ParallelBlock and _known(block, _QUANTISED)


def _known(module: nn.Module, kinds: dict[type[nn.Module], _Kind]) -> bool:
    kind, held = kinds.get(type(module)), vars(module)
    if kind is None or type(module).forward is not kind.forward:
        return False
    tensors = (*module._parameters, *module._buffers, *module._modules)
    if {*held, *tensors} - _OF_EVERY_MODULE != kind.attributes:
        return False
    missing = kind.children.keys() - module._modules.keys()
    if module._modules.keys() - kind.children.keys() or missing - kind.optional:
        return False
    if any(held[name] is not None for name in missing):
        return False
    if not all(
        _plain(p, getattr(module, f"{n}_spec"), module) for n, p in module._parameters.items()
    ):
        return False
    children = module._modules.items()
    return kind.fits(module) and all(
        child is not None and type(child) in kind.children[name] and _known(child, kinds)
        for name, child in children
    )


def _plain(parameter: Tensor | None, spec: Any, module: Any) -> bool:
    """Whether a parameter is of a class that kernels know, on the CPU, and of its shape."""
    return parameter is None or (
        type(parameter) in (nn.Parameter, QuantisedWeight)
        and parameter.is_cpu
        and parameter.layout == torch.strided
        and tuple(parameter.shape) == spec.local_shape(module.tp.rank)
    )


class Unchanged:
    """Whether blocks are what they were when this was made; takes a few microseconds a block."""

    def __init__(self, blocks: Blocks) -> None:
        modules = list(blocks.modules())
        self._modules = modules
        self._classes = [type(module) for module in modules]
        held = [vars(module) for module in modules]
        self._held_by = held
        self._counts = [len(found) for found in held]
        alike: dict[
            tuple[type, frozenset[str]], list[dict[str, Any]]
        ] = {}  # with attributes of the same names
        for cls, found in zip(self._classes, held, strict=True):
            alike.setdefault((cls, frozenset(found)), []).append(found)
        self._attributes = []
        for (_, names), group in alike.items():
            own = sorted(names - _OF_EVERY_MODULE)
            read = operator.itemgetter("training", "_modules", *own)
            self._attributes.append((read, group, [*map(read, group)]))
        self._hooks = [vars(m)[hooks] for m in modules for hooks in _HOOKS]
        self._children = [m._modules for m in modules]
        self._had = [dict(children) for children in self._children]
        self._tensors = [found for m in modules for found in (m._parameters, m._buffers) if found]
        self._held = list(_values(self._tensors))
        self._count = len(self._held)
        self._parameters = [p for m in modules for p in m._parameters.values() if p is not None]

    def __call__(self) -> bool:
        """Whether their classes, attributes, children and tensors are the same objects."""
        return (
            all(map(operator.is_, map(type, self._modules), self._classes))
            and [*map(len, self._held_by)] == self._counts
            and all([*map(read, held)] == were for read, held, were in self._attributes)
            and all(map(operator.eq, self._children, self._had))
            and sum(map(len, self._tensors)) == self._count
            and all(map(operator.is_, _values(self._tensors), self._held))
        )

    def runs_as_written(self, dtype: torch.dtype) -> bool:
        """Whether nothing else would run with them, and all is of this dtype and on the CPU."""
        return (
            not any(_GLOBAL_HOOKS)
            and not any(self._hooks)
            and all(cls.forward is kind.forward for cls, kind in _KINDS.items())
            and all(p.dtype is dtype and p.is_cpu for p in self._parameters)
        )


def _values(held: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(found.values() for found in held)
