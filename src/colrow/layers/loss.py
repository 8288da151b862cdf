"""Cross entropy on logits whose vocabulary is divided over ranks: full logits exist nowhere."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colrow.comm import primitives
from colrow.comm.autograd import apply
from colrow.comm.group import ParallelGroup
from colrow.layers.embedding import check_range
from colrow.partition import Partition

Reduction = Literal["mean", "sum", "none"]
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    tp: ParallelGroup,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    partition: Partition | None = None,
    layer: str = "loss",
) -> Tensor:
    """``-log softmax(logits)[label]`` and its variants, from vocabulary shards.

    Forward sends one all-gather of three numbers per token and rank (largest logit, sum of
    exponentials, logit of the label; the sum of logits too with label smoothing, a checksum without
    ``partition``), from which every rank has the exact result. Backward sends nothing. Everything
    is accumulated in fp32 (fp64 for fp64 logits); the gradient has the dtype of the logits, which
    are not written to.

    Args:
        logits: ``[..., vocab_local]``, this rank's range of the vocabulary.
        labels: ``[...]``, int64, global ids, the same on every rank.
        ignore_index: tokens with this label have loss and gradient 0 and do not count in the mean.
        label_smoothing: weight of the uniform distribution in the target (Szegedy et al. 2016), as
            in :func:`torch.nn.functional.cross_entropy`.
        z_loss: adds ``z_loss * logsumexp(logits)^2`` per token (Chowdhery et al. 2022, section 5).
        reduction: "mean" over the tokens that count, "sum", or "none" for ``[...]``.
        partition: how the vocabulary is divided. Without it the ranks exchange their sizes first.

    Raises:
        ValueError: a label outside the vocabulary that is not ``ignore_index``; logits that are
            whole rather than this rank's shard; shapes that do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: labels "
            "should have the shape of the logits without the last dimension"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}: must be between 0 and 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
    exchanged = partition is None
    if partition is None:
        partition = primitives.exchange_sizes(logits, tp, -1, layer=layer)
    primitives.check_split(partition, tp)
    if 0 in partition.sizes:
        raise ValueError(f"a rank has no logits: the sizes are {list(partition.sizes)}")
    if logits.shape[-1] != partition.size(tp.rank):
        whole = logits.shape[-1] == partition.length
        raise ValueError(
            f"the loss got logits for {logits.shape[-1]} tokens, but this rank holds "
            f"{partition.size(tp.rank)} of {partition.length}"
            + (": these are gathered logits; give it the local ones" if whole else "")
        )
    check_range(labels, partition.length, "label", ignore=ignore_index)
    losses: Tensor = apply(
        _CrossEntropy,
        logits,
        labels,
        tp,
        partition,
        ignore_index,
        label_smoothing,
        z_loss,
        exchanged,
        layer,
    )
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (labels != ignore_index).sum()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        tp: ParallelGroup,
        partition: Partition,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        check_gathered: bool,
        layer: str,
    ) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        start, stop = partition.bounds[tp.rank]
        mine = (labels >= start) & (labels < stop)
        position = (labels - start).masked_fill(~mine, 0).unsqueeze(-1)
        values = logits.to(wide)
        largest = values.amax(-1)
        # A shard of which every token is masked out (-inf) adds nothing, and inf - inf is nan.
        largest = largest.masked_fill(largest == -math.inf, torch.finfo(wide).min)
        exponentials = torch.sub(values, largest.unsqueeze(-1)).exp_()
        label_logit = values.gather(-1, position).squeeze(-1).masked_fill(~mine, 0)
        statistics = [largest, exponentials.sum(-1), label_logit]
        if label_smoothing:
            statistics.append(values.sum(-1))
        if check_gathered:
            statistics.append(_checksum(exponentials))
        gathered = primitives.all_gather(torch.stack(statistics).unsqueeze(0), tp, 0, layer=layer)
        maxima, sums = gathered[:, 0], gathered[:, 1]  # each [ranks, ...]
        if check_gathered and tp.size > 1:
            _check_not_gathered(maxima, sums, gathered[:, -1], logits)
        top = maxima.amax(0)
        total = (sums * torch.exp(maxima - top)).sum(0)
        # Differences to the largest logit first: the digits of large logits would be lost in log_z.
        log_total, log_z = torch.log(total), top + torch.log(total)
        loss = (1 - label_smoothing) * (log_total + (top - gathered[:, 2].sum(0)))
        loss = loss + z_loss * log_z.square()
        if label_smoothing:
            mean = gathered[:, 3].sum(0) / partition.length
            loss = loss + label_smoothing * (log_total + (top - mean))
        ignored = labels == ignore_index
        share = torch.exp(largest - top) / total  # times the exponentials: the probabilities
        ctx.save_for_backward(exponentials, share, log_z, position, mine, ignored)
        ctx.label_smoothing, ctx.z_loss = label_smoothing, z_loss
        ctx.vocab_size, ctx.dtype = partition.length, logits.dtype
        return loss.masked_fill(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        exponentials, share, log_z, position, mine, ignored = ctx.saved_tensors
        grad = grad.to(share.dtype).masked_fill(ignored, 0)
        scale = grad * (1 + 2 * ctx.z_loss * log_z)
        dlogits = exponentials * (share * scale).unsqueeze(-1)
        hit = (-(1 - ctx.label_smoothing) * grad).masked_fill(~mine, 0).unsqueeze(-1)
        dlogits.scatter_add_(-1, position, hit)
        if ctx.label_smoothing:
            dlogits -= (ctx.label_smoothing / ctx.vocab_size) * grad.unsqueeze(-1)
        return dlogits.to(ctx.dtype), None, None, None, None, None, None, None, None


def _checksum(exponentials: Tensor) -> Tensor:
    """A sum over the vocabulary that also depends on where each value stands."""
    place = torch.arange(exponentials.shape[-1], device=exponentials.device)
    return exponentials @ torch.frac(place * _GOLDEN_RATIO).to(exponentials.dtype)


def _check_not_gathered(maxima: Tensor, sums: Tensor, checksums: Tensor, logits: Tensor) -> None:
    """Different shards never have the same statistics for every token; constant logits may."""
    if logits.is_meta or torch.compiler.is_compiling() or not maxima.numel():
        return
    same = ((maxima == maxima[0]) & (sums == sums[0]) & (checksums == checksums[0])).all()
    constant = (sums == logits.shape[-1]).all()
    if bool(same & ~constant):
        raise ValueError(
            f"every rank gave the loss the same logits {tuple(logits.shape)}: these look gathered; "
            "give it this rank's shard, as a column-parallel head without gather_output leaves it"
        )
