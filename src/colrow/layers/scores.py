"""Attention written out, for what fused kernels know nothing of: soft caps, sinks, our dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from colrow.comm.group import ParallelGroup
from colrow.layers.describe import SinksSpec
from colrow.layers.described import Described
from colrow.partition import Partition, Range

Runs = Sequence[tuple[Range, Range]]
_ELEMENTS = 1 << 24
"""Scores that are computed at a time where nothing is kept for backward."""


class Sinks(Described):
    """One more score for each query head, learned, whose weight goes nowhere (gpt-oss).

    ================  ==============================
    parameter         ``weight`` ``[heads_local]``
    forward sends     nothing
    backward sends    nothing
    ================  ==============================
    """

    def __init__(
        self,
        heads: Partition,
        tp: ParallelGroup,
        *,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(SinksSpec(heads), tp, layer=layer, device=device, dtype=dtype)
        torch.nn.init.zeros_(self.weight)  # the decoder draws them, as all its weights

    def extra_repr(self) -> str:
        """Heads held and in all."""
        return f"{self.weight.numel()} of {self.weight_spec.shape[0]} heads"


def softcapped(scores: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(scores / cap)`` (Gemma team 2024, section 2); None leaves them as they are."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def attend_written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Runs,
    bias: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention with every score in memory.

    Memory: ``batch x heads x queries x keys`` numbers some three times over, in the dtype of the
    queries and in fp32, of which backward keeps about two; without gradients it goes through the
    queries in parts, and holds the scores of one part.

    Args:
        q: ``[batch, heads, queries, dim]``.
        k, v: ``[batch, kv_heads, keys, dim]``.
        runs: query heads and the KV heads that serve them, equally many each.
        bias: ``[batch or 1, heads or 1, queries, keys]``: bool, True where a query sees a key, or
            what is added to the scores.
        scale: what scores are multiplied by.
        softcap: see :func:`softcapped`; before the bias.
        sinks: ``[heads]``, one more score for each.
        drop: applied to the weights.

    Returns:
        ``[batch, heads, queries, dim]``.
    """

    def part(q: Tensor, bias: Tensor) -> Tensor:
        scores = softcapped(_products(q, k.transpose(-1, -2), runs) * scale, softcap)
        is_mask = bias.dtype == torch.bool
        scores = scores.masked_fill(~bias, -math.inf) if is_mask else scores + bias
        weights = _weights(scores, sinks)
        return _products(weights if drop is None else drop(weights), v, runs)

    queries, keys = q.shape[2], k.shape[2]
    rows = max(1, _ELEMENTS // max(1, q.shape[0] * q.shape[1] * keys))
    if torch.is_grad_enabled() or drop is not None or rows >= queries:
        return part(q, bias)
    starts = range(0, queries, rows)
    parts = [part(q[:, :, at : at + rows], bias[:, :, at : at + rows]) for at in starts]
    return torch.cat(parts, dim=2)


def _products(left: Tensor, right: Tensor, runs: Runs) -> Tensor:
    """``left @ right``: matrices of query heads times those of the KV heads that serve them.

    The query heads of a KV head become rows of one matrix, so that nothing is repeated.
    """
    batch, _, queries, width = left.shape
    parts = []
    for (q0, q1), (kv0, kv1) in runs:
        rows = left[:, q0:q1].reshape(batch, kv1 - kv0, -1, width)
        product = rows @ right[:, kv0:kv1]
        parts.append(product.view(batch, q1 - q0, queries, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys, in fp32 (fp64 for fp64), beside the sinks where there are any."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)
    return weights if sinks is None else weights[..., :-1]
