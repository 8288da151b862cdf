"""The vocabulary-parallel loss against torch's cross entropy on the whole logits in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import ParallelGroup, Partition, vocab_parallel_cross_entropy
from tests.devices import moved
from tests.layers.dense import TOLERANCE, assert_close, raises, random
from tests.ranks import RankPool

VOCABULARY = 97
SHAPE = (2, 5)


def make_labels(shape: tuple[int, ...], ignore: int | None) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    labels = moved(torch.randint(VOCABULARY, shape, generator=generator, device="cpu"))
    labels.view(-1)[:2] = torch.tensor([0, VOCABULARY - 1])
    if ignore is not None:
        labels.view(-1)[2:5] = ignore
    return labels


def dense_loss(
    logits: Tensor, labels: Tensor, ignore: int, smoothing: float, z: float, reduction: str
) -> Tensor:
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = F.cross_entropy(
        flat, targets.long(), ignore_index=ignore, label_smoothing=smoothing, reduction="none"
    )
    counted = targets != ignore
    losses = losses + z * flat.logsumexp(-1).square() * counted
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def compare(
    tp: ParallelGroup,
    logits: Tensor,
    labels: Tensor,
    *,
    p: Partition | None = None,
    given: bool = True,
    ignore: int = -100,
    smoothing: float = 0.0,
    z: float = 0.0,
    reduction: str = "mean",
) -> None:
    what = f"{logits.dtype} {tuple(labels.shape)} {ignore=} {smoothing=} {z=} {reduction=} {given=}"
    p = p or Partition.even(logits.shape[-1], tp.size)
    whole = logits.to(torch.float64, copy=True).requires_grad_()
    expected = dense_loss(whole, labels, ignore, smoothing, z, reduction)
    grad = random(*expected.shape, seed=5)
    expected.backward(grad)
    assert whole.grad is not None

    start, stop = p.bounds[tp.rank]
    mine = logits[..., start:stop].clone().requires_grad_()
    kept = mine.detach().clone(), labels.clone()
    loss = vocab_parallel_cross_entropy(
        mine,
        labels,
        tp,
        ignore_index=ignore,
        label_smoothing=smoothing,
        z_loss=z,
        reduction=reduction,  # type: ignore[arg-type]
        partition=p if given else None,
    )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert loss.dtype == wide, what
    loss.backward(grad.to(wide))
    assert mine.grad is not None and mine.grad.dtype == logits.dtype, what
    assert_close(loss, expected, 1e-6 if wide == torch.float32 else 1e-12, f"{what}: loss")
    tolerance = TOLERANCE[logits.dtype]
    assert_close(mine.grad, whole.grad[..., start:stop], tolerance, f"{what}: gradient")
    assert torch.equal(mine.detach(), kept[0]) and torch.equal(labels, kept[1]), what


def check_variants(tp: ParallelGroup) -> None:
    logits = 3 * random(*SHAPE, VOCABULARY)
    for ignore, smoothing, z, reduction, given in itertools.product(
        (-100, 7, -1), (0.0, 0.1, 1.0), (0.0, 1e-2), ("mean", "sum", "none"), (True, False)
    ):
        labels = make_labels(SHAPE, ignore)
        compare(
            tp,
            logits,
            labels,
            ignore=ignore,
            smoothing=smoothing,
            z=z,
            reduction=reduction,
            given=given,
        )
    uneven = Partition.ratio(VOCABULARY, [1 + rank for rank in range(tp.size)])
    compare(tp, logits, make_labels(SHAPE, None), p=uneven)
    compare(tp, logits, make_labels(SHAPE, None), p=uneven, given=False)
    compare(tp, logits, make_labels(SHAPE, None).int())
    for shape in ((6,), (2, 2, 3), ()):
        labels = torch.full(shape, 5) if shape == () else make_labels(shape, None)
        compare(tp, random(*shape, VOCABULARY), labels)


def check_dtypes(tp: ParallelGroup) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for smoothing, z in ((0.0, 0.0), (0.1, 1e-3)):
            logits = (2 * random(*SHAPE, VOCABULARY)).to(dtype)
            compare(tp, logits, make_labels(SHAPE, -100), smoothing=smoothing, z=z)


def check_extremes(tp: ParallelGroup) -> None:
    """No overflow in large logits; tokens that are masked out, on whole ranks too."""
    labels = make_labels(SHAPE, -100).clamp(max=20)
    compare(tp, 1e4 * random(*SHAPE, VOCABULARY), labels)
    compare(tp, 3e4 * random(*SHAPE, VOCABULARY).tanh().half(), labels)
    compare(tp, random(*SHAPE, VOCABULARY) + 1e5, labels)
    masked = random(*SHAPE, VOCABULARY)
    masked[..., 21:] = -math.inf
    compare(tp, masked, labels)
    compare(tp, masked.float(), labels, z=1e-3)
    # Constant logits are equal on all ranks without being gathered: the loss is log(96).
    compare(tp, torch.zeros(*SHAPE, 96), labels, given=False)
    # So are the maxima and sums of shards that hold the same values in another order.
    turned = torch.cat([torch.arange(4.0).roll(rank) for rank in range(tp.size)])
    compare(tp, turned.expand(*SHAPE, -1).clone(), labels.clamp(max=3), given=False)


def check_all_ignored(tp: ParallelGroup) -> None:
    """As in torch the mean over no token is nan; sum is 0, and so is every gradient."""
    labels = torch.full(SHAPE, -100)
    p = Partition.even(VOCABULARY, tp.size)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        logits = random(*SHAPE, p.size(tp.rank)).requires_grad_()
        loss = vocab_parallel_cross_entropy(
            logits,
            labels,
            tp,
            partition=p,
            reduction=reduction,  # type: ignore[arg-type]
        )
        same = torch.equal(loss, torch.tensor(expected, dtype=torch.float64))
        assert same or (math.isnan(expected) and loss.isnan())
        loss.backward()
        assert logits.grad is not None and not logits.grad.any()


def check_refusals(tp: ParallelGroup) -> None:
    p = Partition.even(VOCABULARY, tp.size)
    whole = random(*SHAPE, VOCABULARY)
    mine = whole[..., : p.size(tp.rank)]
    labels = make_labels(SHAPE, -100)
    for bad in (VOCABULARY, -1, 10**9):
        wrong = labels.clone()
        wrong[1, 1] = bad
        for partition in (p, None):
            with raises(ValueError, f"label {bad} is outside the valid range 0 to 96"):
                vocab_parallel_cross_entropy(mine, wrong, tp, partition=partition)
    if tp.size > 1:
        with raises(ValueError, f"{p.size(tp.rank)} of 97", "gathered logits"):
            vocab_parallel_cross_entropy(whole, labels, tp, partition=p)
        with raises(ValueError, "gathered", "(2, 5, 97)"):
            vocab_parallel_cross_entropy(whole, labels, tp)
        with raises(ValueError, "side by side"):
            vocab_parallel_cross_entropy(
                whole, labels, tp, partition=Partition.replicated(VOCABULARY, tp.size)
            )
    with raises(ValueError, "this rank holds", "97"):
        vocab_parallel_cross_entropy(mine[..., :3], labels, tp, partition=p)
    with raises(ValueError, f"over {tp.size + 1} ranks"):
        vocab_parallel_cross_entropy(mine, labels, tp, partition=Partition.even(9, tp.size + 1))
    empty = Partition.from_sizes([0] * (tp.size - 1) + [VOCABULARY])
    if tp.size > 1:
        with raises(ValueError, "a rank has no logits", "[0, 97]"):
            vocab_parallel_cross_entropy(mine, labels, tp, partition=empty)
    for shape in ((2, 4), (10,), (2, 5, 1)):
        with raises(ValueError, "logits (2, 5,", f"labels {shape}"):
            vocab_parallel_cross_entropy(mine, torch.zeros(shape, dtype=torch.int64), tp)
    with raises(TypeError, "labels must be int64 or int32, got torch.float32"):
        vocab_parallel_cross_entropy(mine, labels.float(), tp, partition=p)
    with raises(ValueError, "label_smoothing=1.5"):
        vocab_parallel_cross_entropy(mine, labels, tp, label_smoothing=1.5)
    with raises(ValueError, "reduction='max'"):
        vocab_parallel_cross_entropy(mine, labels, tp, reduction="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check_variants)
    ranks(n, check_dtypes)
    ranks(n, check_extremes)


@pytest.mark.parametrize("n", [1, 3])
def test_all_labels_ignored(ranks: RankPool, n: int) -> None:
    ranks(n, check_all_ignored)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_what_does_not_fit_is_refused(ranks: RankPool, n: int) -> None:
    ranks(n, check_refusals)
