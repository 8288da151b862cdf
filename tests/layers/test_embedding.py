from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import ParallelGroup, Partition, PositionEmbedding, VocabParallelEmbedding
from tests.devices import moved
from tests.layers.dense import Weights, compare, divided, raises
from tests.ranks import RankPool

VOCABULARY, DIM, BATCH = 97, 6, 2
FP64 = torch.float64


def dense(weights: Weights, ids: Tensor) -> Tensor:
    return F.embedding(ids, weights["weight"])


def token_ids(*shape: int) -> Tensor:
    """Some tokens more than once, and the first and the last of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = moved(torch.randint(VOCABULARY, shape, generator=generator, device="cpu"))
    ids.view(-1)[:4] = torch.tensor([0, VOCABULARY - 1, 5, 5])[: ids.numel()]
    return ids


def check_vocabulary(tp: ParallelGroup) -> None:
    n = tp.size
    for p in (None, Partition.ratio(VOCABULARY, [1 + rank for rank in range(n)])):
        for dtype in (torch.int64, torch.int32):
            plain = VocabParallelEmbedding(VOCABULARY, DIM, tp, partition=p, dtype=FP64)
            for shape in ((BATCH, 7), (7,), (2, 2, 3)):
                compare(tp, plain, dense, token_ids(*shape).to(dtype), f"{plain} {shape}")
        split = VocabParallelEmbedding(
            VOCABULARY, DIM, tp, partition=p, sequence_parallel=True, dtype=FP64
        )
        for sequence in (Partition.even(8, n), Partition.even(7, n), Partition.even(n, n)):
            for given in (sequence, None):
                for batch in ((BATCH, 2), ()):
                    compare(
                        tp,
                        split,
                        dense,
                        token_ids(*batch, sequence.length),
                        f"{split} over {sequence}",
                        y_spec=lambda y, s=sequence: divided(y, -2, s),
                        run=lambda ids, s=given, layer=split: layer(ids, sequence=s),
                    )


def check_positions(tp: ParallelGroup) -> None:
    n = tp.size
    for sp in (False, True):
        layer = PositionEmbedding(11, DIM, tp, sequence_parallel=sp, dtype=FP64)
        for positions in (torch.arange(7).unsqueeze(0), torch.arange(14).view(2, 7) % 11):
            sequence = Partition.even(7, n)
            for given in (sequence, None):
                compare(
                    tp,
                    layer,
                    dense,
                    positions,
                    f"positions sp={sp}",
                    y_spec=(lambda y, s=sequence: divided(y, -2, s)) if sp else None,
                    run=lambda at, s=given, layer=layer: layer(at, sequence=s),
                )


def check_frozen(tp: ParallelGroup) -> None:
    for sp in (False, True):
        for layer in (
            VocabParallelEmbedding(VOCABULARY, DIM, tp, sequence_parallel=sp),
            PositionEmbedding(VOCABULARY, DIM, tp, sequence_parallel=sp),
        ):
            layer.weight.requires_grad_(False)
            sequence = Partition.even(8, tp.size)
            compare(
                tp,
                layer,
                dense,
                token_ids(2, 8),
                "frozen",
                y_spec=(lambda y, s=sequence: divided(y, -2, s)) if sp else None,
            )


def check_refusals(tp: ParallelGroup) -> None:
    n = tp.size
    words = VocabParallelEmbedding(VOCABULARY, DIM, tp)
    for bad in (VOCABULARY, -1, 10**12):
        with raises(ValueError, f"token id {bad} is outside the valid range 0 to 96"):
            words(torch.tensor([[3, bad]]))
    with raises(TypeError, "token ids must be int64 or int32, got torch.float32"):
        words(torch.zeros(2, 3))
    positions = PositionEmbedding(11, DIM, tp)
    with raises(ValueError, "position 11 is outside the valid range 0 to 10"):
        positions(torch.arange(12).unsqueeze(0))
    for partition in (Partition.even(96, n), Partition.even(VOCABULARY, n + 1)):
        with raises(ValueError, f"num_embeddings=97 on {n} ranks", f"{partition.length}"):
            VocabParallelEmbedding(VOCABULARY, DIM, tp, partition=partition)
    with raises(ValueError, "side by side"):
        VocabParallelEmbedding(5, DIM, tp, partition=Partition.replicated(5, n))
    with raises(ValueError, "num_embeddings=1 leaves a rank without any", "[1, 0]"):
        VocabParallelEmbedding(1, DIM, tp)
    split = VocabParallelEmbedding(VOCABULARY, DIM, tp, sequence_parallel=True)
    with raises(ValueError, "should be 6, not 7"):
        split(token_ids(2, 7), sequence=Partition.even(6, n))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check_vocabulary)
    ranks(n, check_positions)
    ranks(n, check_frozen)


@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    ranks(1, check_refusals_of_one)
    ranks(2, check_refusals)


def check_refusals_of_one(tp: ParallelGroup) -> None:
    words = VocabParallelEmbedding(VOCABULARY, DIM, tp)
    for bad in (VOCABULARY, -1):
        with raises(ValueError, f"token id {bad} is outside the valid range 0 to 96"):
            words(torch.tensor([[3, bad]]))
