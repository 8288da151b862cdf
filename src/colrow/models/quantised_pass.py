"""One more token of one sequence through blocks whose weights stay quantised: ggml does the work.

Between two collectives, and around the attention, all operations of a block are one graph of ggml,
which one call computes: three a block. Norms, rotations and activations are in fp32; the products
round what they multiply with to 8 bits in blocks (:mod:`colrow.layers.quantised`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_float, c_int
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.comm import primitives
from colrow.layers import ggml
from colrow.layers.attention import ParallelAttention
from colrow.layers.block import ParallelBlock
from colrow.layers.context import AttentionCache, AttentionContext
from colrow.layers.grouped_query import group_sizes
from colrow.layers.mlp import ParallelMLP
from colrow.layers.norm import RMSNorm
from colrow.layers.quantised import QuantisedWeight
from colrow.layers.row import RowParallelLinear
from colrow.models.working_rows import WorkingRows

_TENSORS = 96  # at most, in a graph
_INTERLEAVED, _HALVES = 0, 2  # rotary pairs are (2i, 2i + 1), or (i, i + dims / 2)
# The tanh form of GELU is x * sigmoid(2 * _SLOPE * (x + _CUBE * x ** 3)).
_SLOPE, _CUBE = 0.7978845608028654, 0.044715


class QuantisedPass:
    """The blocks, all of which :func:`colrow.models.known_blocks.known_quantised` knows."""

    def __init__(self, blocks: Sequence[ParallelBlock]) -> None:
        library = ggml.installed()
        rows = WorkingRows(torch.float32)
        first = blocks[0].attention
        assert isinstance(first, ParallelAttention)
        hidden = first.qkv.in_features
        self._stream = rows("stream", hidden)
        self._position = rows("position", 1, dtype=torch.int32)
        self._steps: list[Callable[[AttentionCache], None]] = []
        before: _Added | None = None
        for block in blocks:
            self._steps.append(_step(library, block, rows, before))
            before = _Added(block.mlp.down, block.mlp_post_norm)  # type: ignore[arg-type]
        self._end = _Segment(library, rows, hidden)
        if before is not None:
            self._end.add(before)

    def __call__(self, x: Tensor, context: AttentionContext, cache: AttentionCache) -> Tensor:
        """``[1, 1, hidden]`` to the same behind the last block; extends the cache."""
        self._stream.copy_(x.view(-1))
        self._position.copy_(context.positions.view(-1))
        for step in self._steps:
            step(cache)
        self._end.graph.compute()
        return self._stream.clone().view(x.shape)


class _Added:
    """What is added to the stream once its sum over the ranks is there: the row "partial".

    Attributes:
        bias: of the layer that made it, or None.
        norm: behind that layer, or None.
    """

    def __init__(self, layer: RowParallelLinear, norm: nn.Module | None) -> None:
        self.bias, self.norm = layer.bias, norm


class _Segment:
    """Operations on rows of memory, which are computed in the order in which they are added."""

    def __init__(self, library: ggml.Library, rows: WorkingRows, hidden: int) -> None:
        self.graph, self._rows = ggml.Graph(library, _TENSORS), rows
        self._seen: list[Any] = []
        self._kept: list[Tensor] = []
        self.stream, self.partial = rows("stream", hidden), rows("partial", hidden)

    def tensor(self, memory: Tensor) -> Any:
        """A row, or a matrix ``[rows, width]``, as ggml sees it."""
        return self.graph.tensor(ggml.F32, tuple(reversed(memory.shape)), memory)

    def norm(self, norm: nn.Module, x: Tensor, out: Tensor) -> None:
        """An RMS norm over the last dimension."""
        assert isinstance(norm, RMSNorm)
        self.graph.apply("rms_norm", self.tensor(x), c_float(norm.eps), out=out)
        weight = norm.weight.detach()
        if norm.centred:
            factor, one = self._rows("factor", weight.numel()), c_float(1)
            self.graph.apply("scale_bias", self.tensor(weight), one, one, out=factor)
            weight = factor
        self._with("mul", out, weight)

    def add(self, added: _Added) -> None:
        """The row "partial" to the row "stream"."""
        if added.bias is not None:
            self._with("add", self.partial, added.bias.detach())
        if added.norm is not None:
            self.norm(added.norm, self.partial, self.partial)
        self._with("add", self.stream, self.partial)

    def _with(self, operation: str, x: Tensor, other: Tensor) -> None:
        """``x = operation(x, other)``; a row serves for all rows of a matrix."""
        self.graph.apply(operation, self.tensor(x), self.tensor(other), out=x)

    def linear(self, layer: Any, x: Any, out: Tensor) -> None:
        """This rank's part of a linear layer's product, without the bias.

        Args:
            x: ggml's tensor of as many numbers as the blocks have columns.
        """
        weight, start = layer.weight, 0
        assert isinstance(weight, QuantisedWeight)
        for each in weight.blocks:
            count = each.data.shape[0]
            matrix = self.graph.tensor(each.kind, (weight.width, count), each.data)
            self.graph.apply("mul_mat", matrix, x, out=out[start : start + count])
            start += count

    def column(self, layer: Any, x: Tensor, out: Tensor) -> None:
        """A column-parallel layer."""
        self.linear(layer, self.tensor(x), out)
        if layer.bias is not None:
            self._with("add", out, layer.bias.detach())

    def rotate(self, attention: ParallelAttention, x: Tensor, out: Tensor) -> None:
        """Rotary positions of some heads ``[heads, head_dim]``, at the row "position"."""
        rope = attention.rope
        if rope is None or attention.frequencies is None:
            self.graph.apply("cont", self.tensor(x), out=out)
            return
        position = self._rows("position", 1, dtype=torch.int32)
        where = self.graph.tensor(ggml.I32, (1,), position)
        # At base 1 all angles are the position over these.
        factors = self.tensor(1 / attention.frequencies.float())
        heads = self.graph.tensor(ggml.F32, (x.shape[1], x.shape[0], 1), x)
        numbers = map(c_float, (1.0, 1.0, 0.0, rope.attention_factor, 0.0, 0.0))
        sizes = rope.dims, _INTERLEAVED if rope.interleaved else _HALVES, 0
        self.graph.apply("rope_ext", heads, where, factors, *map(c_int, sizes), *numbers, out=out)

    def attend(self, attention: ParallelAttention) -> Tensor:
        """Attention over the keys and values that :meth:`see` is told; this rank's heads."""
        heads, dim = _Heads.of(attention, self._rows), attention.head_dim
        queries = self.graph.tensor(ggml.F32, (dim, 1, len(heads.grouped)), heads.grouped)
        self._seen = [
            self.graph.tensor(ggml.F32, (dim, 1, attention.kv_heads)) for _ in ("keys", "values")
        ]
        scale = dim**-0.5 if attention.scale is None else attention.scale
        mixed = self._rows("attended", heads.grouped.numel())
        numbers = map(c_float, (scale, 0.0, attention.softcap or 0.0))
        self.graph.apply("flash_attn_ext", queries, *self._seen, None, *numbers, out=mixed)
        return mixed[heads.own]

    def see(self, keys: Tensor, values: Tensor) -> None:
        """What :meth:`attend` attends to next, ``[1, kv_heads, seen, head_dim]`` each."""
        wide = [x.to(torch.float32) for x in (keys, values)]
        self._kept = [x if x.stride(3) == 1 else x.contiguous() for x in wide]
        for tensor, x in zip(self._seen, self._kept, strict=True):
            at = tensor.contents
            at.data, at.ne[1], at.nb[1] = x.data_ptr(), x.shape[2], 4 * x.stride(2)
            at.nb[2] = at.nb[3] = 4 * x.stride(1)

    def gate(self, activation: str, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """``activation(gate) * up``."""
        if activation == "silu":
            self.graph.apply("swiglu_split", self.tensor(gate), self.tensor(up), out=out)
            return
        # gelu(x) = silu(s * x) / s, where s = 2 * _SLOPE * (1 + _CUBE * x ** 2).
        slope = self._rows("slope", gate.numel())
        self.graph.apply("sqr", self.tensor(gate), out=slope)
        factors = c_float(2 * _SLOPE * _CUBE), c_float(2 * _SLOPE)
        self.graph.apply("scale_bias", self.tensor(slope), *factors, out=slope)
        self._with("mul", gate, slope)
        self.graph.apply("swiglu_split", self.tensor(gate), self.tensor(up), out=out)
        self._with("div", out, slope)


def _step(
    library: ggml.Library, block: ParallelBlock, rows: WorkingRows, before: _Added | None
) -> Callable[[AttentionCache], None]:
    """A block as a function of the cache, which leaves what is added to the stream in "partial".

    Args:
        before: what the block before has left there.
    """
    attention, mlp, tp = block.attention, block.mlp, block.tp
    assert isinstance(attention, ParallelAttention) and isinstance(mlp, ParallelMLP)
    hidden = attention.qkv.in_features
    entering = _Segment(library, rows, hidden)
    partial = entering.partial
    whole = partial.view(1, 1, -1)
    if before is not None:
        entering.add(before)
    x = _normed(entering, block.attention_norm, rows)
    keys_and_values = _entering(entering, attention, rows, x)

    leaving = _Segment(library, rows, hidden)
    mixed = leaving.attend(attention)
    given, own = _padded(attention.output, "mixed", rows)
    if given is own:
        given = mixed
    else:
        leaving.graph.apply("cont", leaving.tensor(mixed), out=own)
    leaving.linear(attention.output, leaving.tensor(given), partial)

    expanding = _Segment(library, rows, hidden)
    expanding.add(_Added(attention.output, block.attention_post_norm))
    widened = rows("up", mlp.up.weight.shape[0])
    expanding.column(mlp.up, _normed(expanding, block.mlp_norm, rows), widened)
    gate, up = widened.chunk(2)
    product, product_own = _padded(mlp.down, "product", rows)
    expanding.gate(mlp.activation, gate, up, product_own)
    expanding.linear(mlp.down, expanding.tensor(product), partial)
    names = attention.output.layer, mlp.down.layer

    def step(cache: AttentionCache) -> None:
        entering.graph.compute()
        leaving.see(*keys_and_values(cache))
        leaving.graph.compute()
        primitives.all_reduce(whole, tp, layer=names[0], in_place=True)
        expanding.graph.compute()
        primitives.all_reduce(whole, tp, layer=names[1], in_place=True)

    return step


def _normed(segment: _Segment, norm: nn.Module | None, rows: WorkingRows) -> Tensor:
    """The stream behind a norm, where there is one."""
    if norm is None:
        return segment.stream
    normed = rows("normed", segment.stream.numel())
    segment.norm(norm, segment.stream, normed)
    return normed


def _padded(layer: RowParallelLinear, name: str, rows: WorkingRows) -> tuple[Tensor, Tensor]:
    """Memory for the input of a layer, with zeros for others' columns, and this rank's part."""
    weight = layer.weight
    assert isinstance(weight, QuantisedWeight)
    whole = rows((name, weight.columns), weight.width)
    own = whole[slice(*weight.columns)]
    return whole, whole if own.numel() == whole.numel() else own


@dataclass(frozen=True)
class _Heads:
    """Where a row's queries, keys and values lie for attention.

    The queries of a KV head are side by side, as many as the fullest group has. Where this rank's
    first or last group is incomplete, the queries stand at the end of the first and at the start of
    the last: so they lie side by side, and nobody reads what comes of the other places.

    Attributes:
        grouped: ``[kv_heads * widest, head_dim]``, of which ``own`` numbers are this rank's.
        turned: where the rotated queries and keys go, ``[q_heads + kv_heads, head_dim]``.
    """

    grouped: Tensor
    own: slice
    turned: Tensor

    @classmethod
    def of(cls, attention: ParallelAttention, rows: WorkingRows) -> _Heads:
        """Those of a layer, in memory that all layers share."""
        dim, groups = attention.head_dim, group_sizes(attention.runs)
        queries, keys, widest = attention.q_heads, attention.kv_heads, max(groups)
        before = widest - groups[0] if keys > 1 else 0
        memory = rows("turned", max(keys * widest, before + queries + keys), dim)
        own = slice(before * dim, (before + queries) * dim)
        return cls(memory[: keys * widest], own, memory[before : before + queries + keys])


def _entering(
    segment: _Segment, attention: ParallelAttention, rows: WorkingRows, x: Tensor
) -> Callable[[AttentionCache], tuple[Tensor, Tensor]]:
    """Adds the way to queries, keys and values; what it then does extends a cache with them.

    Returns:
        The keys and values that the query sees.
    """
    index, dim, window = attention.layer_index, attention.head_dim, attention.window
    queries, keys = attention.q_heads, attention.kv_heads
    heads, turned = queries + keys, _Heads.of(attention, rows).turned
    fused = rows("fused", attention.qkv.weight.shape[0])
    segment.column(attention.qkv, x, fused)
    source = fused.view(-1, dim)
    for norm, part in (
        (attention.query_norm, source[:queries]),
        (attention.key_norm, source[queries:heads]),
    ):
        if norm is not None:
            segment.norm(norm, part, part)
    segment.rotate(attention, source[:heads], turned)
    key, value = turned[queries:].view(1, keys, 1, dim), source[heads:].view(1, keys, 1, dim)

    def extend(cache: AttentionCache) -> tuple[Tensor, Tensor]:
        new = (key, value) if getattr(cache, "copies", False) else (key.clone(), value.clone())
        k, v = cache.update(index, *new)
        if window is not None and k.shape[2] > window:
            return k[:, :, -window:], v[:, :, -window:]
        return k, v

    return extend
