"""One more token of one sequence on a CPU: the decoder's forward pass, written out flat.

With one token a call costs more than its arithmetic, twice so as each matmul leaves the caches
cold. Here a layer is some thirty calls in a row, on the modules' own parameters and with the same
collectives, and works in a few rows of memory that are allocated once; nothing has a gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import primitives
from colrow.layers.activation import ACTIVATIONS
from colrow.layers.attention import ParallelAttention
from colrow.layers.block import ParallelBlock
from colrow.layers.column import FusedColumnParallelLinear
from colrow.layers.context import AttentionCache, AttentionContext
from colrow.layers.decoding import Kernel
from colrow.layers.grouped_query import group_sizes
from colrow.layers.mlp import ParallelMLP
from colrow.layers.norm import RMSNorm, rms_scale
from colrow.layers.options import RopeConfig
from colrow.layers.row import RowParallelLinear
from colrow.models.known_blocks import Unchanged, known, known_quantised
from colrow.models.pipeline import Blocks
from colrow.models.quantised_pass import QuantisedPass
from colrow.models.working_rows import WorkingRows

_TORCH = Kernel()
_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_Block = Callable[[AttentionCache], None]


class OneToken:
    """The blocks of a decoder, for one token.

    Parameters are looked up in their modules in every pass, so new ones are seen. Where a block is
    not one that is written out here (see :mod:`colrow.models.known_blocks`), or is not any more,
    the pass is left to the modules themselves. Blocks whose weights stay quantised go through
    :class:`colrow.models.quantised_pass.QuantisedPass`.
    """

    def __init__(self, blocks: Blocks, numbers: Iterable[int]) -> None:
        """Of the blocks those with these numbers, in this order."""
        self._blocks, self._numbers = blocks, tuple(numbers)
        self._examine()

    def _examine(self) -> None:
        """Looks at the blocks as they are now."""
        self._unchanged = Unchanged(self._blocks)
        found = [self._blocks._modules.get(str(number)) for number in self._numbers]
        blocks = [block for block in found if isinstance(block, ParallelBlock)]
        whole = len(blocks) == len(found)
        self._quantised = whole and all(map(known_quantised, blocks))
        self._flat = whole and all(map(known, blocks))
        self._known = blocks
        self._drops = any(
            block.training and block.dropout.p + block.attention.dropout.p > 0 for block in blocks
        )
        self._rotations: dict[Any, Tensor] = {}
        for block in blocks if self._flat else ():
            attention: Any = block.attention
            if attention.rope is None:
                continue
            table = self._rotations.setdefault(attention.rope, attention.frequencies)
            self._flat = self._flat and torch.equal(table, attention.frequencies)
        self._passes = threading.local()  # each thread has rows of its own

    def __reduce__(self) -> Any:
        """Nothing: it belongs to these modules, and not to a copy of them."""
        return type(None), ()

    @staticmethod
    def fits(blocks: Blocks) -> bool:
        """Whether the blocks are of a kind that is written out here."""
        return all(map(known, blocks)) or all(map(known_quantised, blocks))

    def serves(self, input_ids: Tensor, x: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether this pass is one token of one sequence, without padding or gradient.

        Args:
            x: its embedding.
        """
        if (
            input_ids.numel() != 1
            or type(x) is not Tensor
            or not x.is_cpu
            or x.dtype not in _DTYPES
            or attention_mask is not None
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return False
        if not self._unchanged():
            self._examine()
        fits = self._flat or self._by_ggml(x.dtype)
        return fits and not self._drops and self._unchanged.runs_as_written(x.dtype)

    def _by_ggml(self, dtype: torch.dtype) -> bool:
        return self._quantised and dtype == torch.float32

    def __call__(self, x: Tensor, context: AttentionContext, cache: AttentionCache) -> Tensor:
        """``[1, 1, hidden]`` to the same behind the last block; as the blocks, it extends cache."""
        return self._pass(x.dtype)(x, context, cache)

    def _pass(self, dtype: torch.dtype) -> QuantisedPass | _FlatPass:
        """This thread's own."""
        found: tuple[torch.dtype, QuantisedPass | _FlatPass] | None
        found = getattr(self._passes, "found", None)
        if found is None or found[0] != dtype:
            if self._by_ggml(dtype):
                made: QuantisedPass | _FlatPass = QuantisedPass(self._known)
            else:
                made = _FlatPass(self._known, self._rotations, dtype)
            found = self._passes.found = dtype, made
        return found[1]


class _FlatPass:
    """All blocks, in torch's operations."""

    def __init__(
        self, blocks: Sequence[ParallelBlock], rotations: dict[Any, Tensor], dtype: torch.dtype
    ) -> None:
        self._rows, self._rotations = WorkingRows(dtype), rotations
        self._blocks = [_flat(block, self._rows) for block in blocks]

    def __call__(self, x: Tensor, context: AttentionContext, cache: AttentionCache) -> Tensor:
        rows = self._rows
        stream = rows("stream", x.numel())
        stream.copy_(x.view(-1))
        for rope, frequencies in self._rotations.items():
            tables = context.rope(frequencies, rope, x.dtype)
            for name, table in zip(("cos", "sin"), tables, strict=True):
                rows((name, rope), rope.dims).copy_(table.view(-1))
        for block in self._blocks:
            block(cache)
        return stream.clone().view(x.shape)


def _flat(block: ParallelBlock, rows: WorkingRows) -> _Block:
    """A block as a function of the cache, which adds to the row "stream"."""
    mlp, parallel_residual = block.mlp, block.parallel_residual
    norms = block.attention_norm, block.mlp_norm
    if (
        not isinstance(block.attention, ParallelAttention)
        or not isinstance(mlp, ParallelMLP)
        or norms[0] is None
        or norms[1] is None
    ):
        raise ValueError(f"{block.attention.prefix}qkv is of no kind that is written out here")
    stream = rows("stream", mlp.up.in_features)
    normed = rows("normed", mlp.up.in_features)
    fused = rows("fused", block.attention.qkv.weight.shape[0])
    widened = rows("up", mlp.up.weight.shape[0])
    gate, hidden = widened.chunk(2) if mlp.gated else (widened, None)
    act = ACTIVATIONS[mlp.activation]
    attention_norm, mlp_norm = (
        _norm(norm, stream, normed, rows) for norm in norms if norm is not None
    )
    qkv, up = _column(block.attention.qkv, fused), _column(mlp.up, widened)
    attend = _attention(block.attention, fused, rows)
    output, down = _row(block.attention.output, rows), _row(mlp.down, rows)

    def forward(cache: AttentionCache) -> None:
        qkv(attention_norm())
        mixed = attend(cache)
        if parallel_residual:
            up(mlp_norm())
            stream.add_(output(mixed))
        else:
            stream.add_(output(mixed))
            up(mlp_norm())
        activated = act(gate)
        stream.add_(down(activated if hidden is None else activated.mul_(hidden)))

    return forward


def _attention(
    attention: ParallelAttention, fused: Tensor, rows: WorkingRows
) -> Callable[[AttentionCache], Tensor]:
    """From the row of queries, keys and values to the heads' outputs, ``[q_heads x head_dim]``.

    The queries of a KV head become the query axis of the kernel. Where this rank's first or last
    group is incomplete, the queries stand at the end of the first and at the start of the last: so
    they lie side by side, and nobody reads what comes of the other places.
    """
    rope, index, dim = attention.rope, attention.layer_index, attention.head_dim
    groups = group_sizes(attention.runs)
    widest = max(groups)
    if any(size != widest for size in groups[1:-1]):
        raise ValueError(f"{attention.qkv.layer} is of no kind that is written out here")
    queries, keys = attention.q_heads, attention.kv_heads
    before = widest - groups[0] if keys > 1 else 0
    heads = queries + keys
    turned = rows("turned", max(keys * widest, before + heads), dim)
    grouped = turned[: keys * widest].view(1, keys, widest, dim)
    target = turned[before : before + heads]
    key = target[queries:].view(1, keys, 1, dim)
    source = fused.view(-1, dim)
    value = source[heads:].view(1, keys, 1, dim)
    source = source[:heads]
    rotate = _rotation(rope, source, target, rows)

    def forward(cache: AttentionCache) -> Tensor:
        rotate()
        new = (key, value) if getattr(cache, "copies", False) else (key.clone(), value.clone())
        mixed = F.scaled_dot_product_attention(grouped, *cache.update(index, *new))
        return mixed.reshape(-1)[before * dim : (before + queries) * dim]

    return forward


def _rotation(
    rope: RopeConfig | None, source: Tensor, target: Tensor, rows: WorkingRows
) -> Callable[[], object]:
    """Copies heads ``[heads, head_dim]`` to the target, rotated where there is a rotation."""
    if rope is None:
        return lambda: target.copy_(source)
    dims, interleaved = rope.dims, rope.interleaved

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second of each pair of dimensions."""
        first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        return first, second

    cos, sin = rows(("cos", rope), dims), rows(("sin", rope), dims)
    swapped = rows("swapped", len(source), dims)
    rotating, rotated = source[:, :dims], target[:, :dims]
    halves = list(zip(pairs(rotating)[::-1], pairs(sin), pairs(swapped), strict=True))
    rest = (target[:, dims:], source[:, dims:]) if dims < source.shape[1] else None

    def rotate() -> None:
        torch.mul(rotating, cos, out=rotated)
        for other, signed, product in halves:
            torch.mul(other, signed, out=product)
        rotated.add_(swapped)
        if rest is not None:
            rest[0].copy_(rest[1])

    return rotate


def _norm(norm: nn.Module, x: Tensor, out: Tensor, rows: WorkingRows) -> Callable[[], Tensor]:
    if not isinstance(norm, RMSNorm):
        return lambda: norm(x)
    parameters: dict[str, Any] = norm._parameters
    eps = norm.eps
    if x.dtype.itemsize >= 4:
        return lambda: torch.mul(x, rms_scale(x, eps), out=out).mul_(parameters["weight"])
    wide = rows("wide", x.numel(), dtype=torch.float32)

    def narrow() -> Tensor:
        wide.copy_(x)
        return out.copy_(wide.mul_(rms_scale(wide, eps))).mul_(parameters["weight"])

    return narrow


def _column(layer: FusedColumnParallelLinear, out: Tensor) -> Callable[[Tensor], None]:
    parameters: dict[str, Any] = layer._parameters
    multiply = (layer.kernel or _TORCH).row

    def forward(x: Tensor) -> None:
        multiply(x, parameters["weight"], out)
        bias = parameters.get("bias")
        if bias is not None:
            out.add_(bias)

    return forward


def _row(layer: RowParallelLinear, rows: WorkingRows) -> Callable[[Tensor], Tensor]:
    parameters: dict[str, Any] = layer._parameters
    multiply = (layer.kernel or _TORCH).row
    tp, name = layer.tp, layer.layer
    out = rows("partial", layer.weight.shape[0])
    whole = out.view(1, 1, -1)

    def forward(x: Tensor) -> Tensor:
        multiply(x, parameters["weight"], out)
        primitives.all_reduce(whole, tp, layer=name, in_place=True)
        bias = parameters.get("bias")
        return out if bias is None else out.add_(bias)

    return forward
