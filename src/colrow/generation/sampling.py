"""The next token from logits that are divided over ranks; the full logits exist nowhere.

A draw from a softmax is the argmax of logits plus independent Gumbel noise (Maddison, Tarlow and
Minka 2014), so sampling is a maximum like greedy choice. The noise of a token is a function of
(seed, step, row, token) alone: every rank can compute it, and no tensor-parallel size changes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import rng
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.generation.sampling_settings import Sampling
from colrow.partition import Partition

_FIRST_COUNT = 512  # candidates of each rank for top_p: enough for most steps of a trained model
_GROWTH = 4
_LAYER = "sampling"
_GREEDY = Sampling()


def next_tokens(
    logits: Tensor,
    tp: ParallelGroup,
    partition: Partition,
    sampling: Sampling = _GREEDY,
    *,
    step: int = 0,
    first_row: int = 0,
) -> Tensor:
    """Chooses one token for each row; every rank returns the same.

    =====================  =============================================================
    logits                 ``[batch, vocab_local]``; computed in fp32, fp64 if they are
    result                 ``[batch]`` int64
    greedy sends           all-gather of (value, token), 16 bytes a rank and row
    temperature sends      the same
    top_k sends            all-gather of top_k + 1 candidates of each rank, 16 bytes each
    top_p sends            all-gather of 512 candidates of each rank; again with four times
                           as many where these do not reach top_p
    =====================  =============================================================

    Equal logits: greedy takes the lowest token, as ``torch.argmax`` on the full row does.

    Args:
        partition: how the vocabulary is divided, disjoint and in rank order.
        sampling: how to choose.
        step: number of the token in its sequence; a new one gives new noise.
        first_row: number of the first row in its batch, which may come in parts; noise follows it.

    Raises:
        ValueError: when a logit is NaN, or there are not ``partition`` many.
    """
    primitives.check_length(
        logits, 1, partition.size(tp.rank), f"the logits of {tp.name} rank {tp.rank}"
    )
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if sampling.greedy:
        return _argmax(x, tp, partition)
    x = x / sampling.temperature
    key = rng.stream_key(sampling.seed, "sampling", step)
    if not sampling.filters:
        start, stop = partition.bounds[tp.rank]
        tokens = torch.arange(start, stop, device=x.device).expand_as(x)
        return _argmax(x + _gumbel(key, tokens, partition.length, first_row), tp, partition)
    candidates = top_candidates(x, tp, partition, sampling)
    noise = _gumbel(key, candidates.tokens, partition.length, first_row)
    noisy = (candidates.logits + noise).masked_fill(~candidates.kept, -math.inf)
    winners = noisy == noisy.amax(dim=1, keepdim=True)
    return candidates.tokens.masked_fill(~winners, partition.length).amin(dim=1)


@dataclass(frozen=True)
class Candidates:
    """The most likely tokens of the whole vocabulary, the same on every rank.

    Attributes:
        logits: ``[batch, candidates]`` float64, descending; the lower token first among equals.
        tokens: ``[batch, candidates]`` int64.
        kept: ``[batch, candidates]`` bool: what top_k and top_p leave. All that they leave is here.
    """

    logits: Tensor
    tokens: Tensor
    kept: Tensor


def top_candidates(
    x: Tensor, tp: ParallelGroup, partition: Partition, sampling: Sampling
) -> Candidates:
    """The tokens that top_k and top_p leave: those that transformers' processors leave.

    Ties at the k-th logit are all kept. Where top_p cuts through equal logits, as many are kept as
    ``TopPLogitsWarper`` keeps; it leaves open which, here they are those of the lowest tokens.

    Args:
        x: ``[batch, vocab_local]``, divided by the temperature already.

    Raises:
        ValueError: when a logit is NaN.
    """
    count = sampling.top_k + 1 if sampling.top_k else _FIRST_COUNT
    while True:
        candidates, settled = _try_candidates(x, tp, partition, sampling, count)
        if settled:
            return candidates
        count *= _GROWTH


def _try_candidates(
    x: Tensor, tp: ParallelGroup, partition: Partition, sampling: Sampling, count: int
) -> tuple[Candidates, bool]:
    """Candidates from ``count`` of each rank, and whether these were enough to be sure."""
    taken = min(count, partition.largest)
    mine = min(taken, x.shape[1])
    top, index = x.topk(mine, dim=1)
    missing = (0, taken - mine)
    local_logits = F.pad(top.double(), missing, value=-math.inf)
    local_tokens = F.pad(
        (index + partition.bounds[tp.rank][0]).double(), missing, value=partition.length
    )
    # A token that was left out is at most as likely as the last one that was taken.
    nothing = local_logits.new_full((x.shape[0], 1), -math.inf)
    left_out = local_logits[:, -1:] if mine < x.shape[1] else nothing
    mass = torch.logsumexp(x.double(), dim=1, keepdim=True) if mine else nothing
    packed = torch.cat([local_logits, local_tokens, left_out, mass], dim=1).unsqueeze(1)
    every = primitives.all_gather(packed, tp, 1, layer=_LAYER)  # [batch, ranks, 2 * taken + 2]
    _check_numbers(every)
    logits, tokens = every[..., :taken].flatten(1), every[..., taken:-2].flatten(1).long()
    order = tokens.argsort(dim=1)
    logits, tokens = logits.gather(1, order), tokens.gather(1, order)
    logits, order = logits.sort(dim=1, descending=True, stable=True)
    tokens = tokens.gather(1, order)

    bound = every[..., -2].amax(dim=1, keepdim=True)  # all tokens above it are in the list
    settled = bound == -math.inf
    kept, total = tokens < partition.length, torch.logsumexp(every[..., -1], dim=1, keepdim=True)
    if sampling.top_k:
        last = min(sampling.top_k, partition.length) - 1
        threshold = logits[:, last : last + 1]
        settled = settled | (threshold > bound)
        kept = kept & (logits >= threshold)
        total = torch.logsumexp(logits.masked_fill(~kept, -math.inf), dim=1, keepdim=True)
    if sampling.top_p < 1:
        share = torch.exp(logits - total).masked_fill(~kept, 0)
        if not sampling.top_k:
            sure = share.masked_fill(logits <= bound, 0).sum(dim=1, keepdim=True)
            settled = settled | (sure >= sampling.top_p)
        before = F.pad(share.cumsum(dim=1)[:, :-1], (1, 0))
        kept = kept & (before < sampling.top_p)
    return Candidates(logits, tokens, kept), bool(settled.all())


def _argmax(x: Tensor, tp: ParallelGroup, partition: Partition) -> Tensor:
    """The token with the largest value over all ranks, the lowest among equals."""
    if x.shape[1] == 0:
        x = x.new_full((x.shape[0], 1), -math.inf)  # this rank holds no token
    value, index = x.max(dim=1)
    token = index + partition.bounds[tp.rank][0]
    # fp64 holds both exactly, so that one collective is enough.
    mine = torch.stack([value.double(), token.double()], dim=1).unsqueeze(1)
    every = primitives.all_gather(mine, tp, 1, layer=_LAYER)  # [batch, ranks, 2]
    _check_numbers(every)
    winner = every[..., 0].argmax(dim=1, keepdim=True)
    return every[..., 1].gather(1, winner).squeeze(1).long()


def _gumbel(key: int, tokens: Tensor, vocab_size: int, first_row: int) -> Tensor:
    """Standard Gumbel noise for ``[batch, n]`` tokens, float64."""
    rows = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1) + first_row
    return -torch.log(-torch.log(rng.uniform(key, rows * vocab_size + tokens)))


def _check_numbers(gathered: Tensor) -> None:
    """Raises on every rank, since every rank has the same."""
    if bool(gathered.isnan().any()):
        raise ValueError(
            "the logits are not numbers (NaN): the checkpoint is damaged, or its activations "
            "overflow this dtype; try bf16 or fp32"
        )
