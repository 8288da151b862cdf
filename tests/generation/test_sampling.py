from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from colrow.generation.sampling import next_tokens, top_candidates
from colrow.generation.sampling_settings import Sampling
from colrow.partition import Partition
from tests.devices import moved
from tests.ranks import RankError, RankPool

VOCAB = 3001
FILTERS = [
    Sampling(0.7, top_k=1),
    Sampling(0.7, top_k=40),
    Sampling(1.0, top_k=2 * VOCAB),
    Sampling(1.0, top_p=0.9),
    Sampling(1.3, top_p=0.999),
    Sampling(0.6, top_p=1e-6),
    Sampling(1.0, top_k=30, top_p=0.8),
]


def make_logits(kind: str) -> Tensor:
    """``[3, VOCAB]``: rows of different sharpness."""
    generator = torch.Generator().manual_seed(11)
    x = moved(torch.randn(3, VOCAB, generator=generator, dtype=torch.float64, device="cpu"))
    x *= torch.tensor([[0.05], [1.0], [5.0]])
    if kind == "ties":  # a few hundred different values, as bf16 logits have
        return (x * 8).round().float() / 8
    if kind == "holes":
        x[:, ::3] = -math.inf
        x[2, 5:] = -math.inf
    return x


def partition_of(n: int, uneven: bool) -> Partition:
    if not uneven:
        return Partition.even(VOCAB, n)
    sizes = {1: [VOCAB], 2: [1, VOCAB - 1], 3: [0, 600, VOCAB - 600], 4: [7, 0, VOCAB - 11, 4]}
    return Partition.from_sizes(sizes[n])


def mine(tp: ParallelGroup, logits: Tensor, partition: Partition) -> Tensor:
    start, stop = partition.bounds[tp.rank]
    return logits[:, start:stop]


def transformers_keeps(logits: Tensor, sampling: Sampling) -> Tensor:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores > -math.inf


def kept(tp: ParallelGroup, kind: str, uneven: bool) -> list[Tensor]:
    logits, partition = make_logits(kind), partition_of(tp.size, uneven)
    found = []
    for sampling in FILTERS:
        x = mine(tp, logits, partition) / sampling.temperature
        candidates = top_candidates(x, tp, partition, sampling)
        mask = torch.zeros(3, VOCAB + 1, dtype=torch.bool)
        likely = candidates.kept & (candidates.logits > -math.inf)
        mask.scatter_(1, candidates.tokens.masked_fill(~likely, VOCAB), True)
        found.append(mask[:, :VOCAB])
    return found


@pytest.mark.parametrize("kind", ["plain", "ties", "holes"])
@pytest.mark.parametrize(("n", "uneven"), [(1, False), (2, False), (2, True), (3, True), (4, True)])
def test_filters_keep_what_transformers_keeps(
    n: int, uneven: bool, kind: str, ranks: RankPool
) -> None:
    expected = [transformers_keeps(make_logits(kind), sampling) for sampling in FILTERS]
    for found in ranks(n, kept, kind, uneven):
        for sampling, got, want in zip(FILTERS, found, expected, strict=True):
            for row, logits in enumerate(make_logits(kind)):
                # transformers' sort leaves open which of equal logits it keeps: the first, here.
                cut = logits == logits[want[row]].min()
                first = cut.nonzero()[: int((cut & want[row]).sum()), 0]
                expected_row = (want[row] & ~cut).index_fill(0, first, True)
                assert torch.equal(got[row], expected_row), (sampling, row)


def choose(tp: ParallelGroup, kind: str, uneven: bool) -> list[list[list[int]]]:
    logits, partition = make_logits(kind), partition_of(tp.size, uneven)
    x = mine(tp, logits, partition)
    return [
        [next_tokens(x, tp, partition, sampling, step=step).tolist() for step in range(5)]
        for sampling in [Sampling(), Sampling(0.8), *FILTERS]
    ]


@pytest.mark.parametrize("kind", ["plain", "ties", "holes"])
def test_tokens_are_the_same_on_every_rank_and_at_every_size(kind: str, ranks: RankPool) -> None:
    alone = ranks(1, choose, kind, False)[0]
    greedy, sampled = alone[0], alone[1]
    assert greedy == [make_logits(kind).argmax(dim=1).tolist()] * 5
    assert len({row[0] for row in sampled}) > 1  # another step, another draw
    for n in (2, 3, 4):
        for uneven in (False, True):
            assert ranks(n, choose, kind, uneven) == [alone] * n


def test_a_tie_goes_to_the_lowest_token(ranks: RankPool) -> None:
    assert ranks(3, tie) == [[3, 4, 0]] * 3


def tie(tp: ParallelGroup) -> list[int]:
    logits = torch.zeros(3, 9)
    logits[0, [3, 5, 8]] = 1
    logits[1, [4, 7]] = 1
    partition = Partition.even(9, 3)
    return next_tokens(mine(tp, logits, partition), tp, partition).tolist()


DRAWS, STEPS = 4000, 6
SMALL = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, 1.5, -3.0, 1.0, 0.0, -0.5])


def draw(tp: ParallelGroup, sampling: Sampling) -> Tensor:
    partition = Partition.even(len(SMALL), tp.size)
    x = mine(tp, SMALL.repeat(DRAWS, 1), partition)
    steps = [next_tokens(x, tp, partition, sampling, step=step) for step in range(STEPS)]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=6), Sampling(1.0, top_p=0.8)]
)
def test_frequencies_are_the_softmax(sampling: Sampling, ranks: RankPool) -> None:
    tokens = ranks(2, draw, sampling)[0]  # [draws, steps]
    scores = (SMALL / sampling.temperature).unsqueeze(0)
    keep = transformers_keeps(SMALL.unsqueeze(0), sampling)
    p = torch.softmax(scores.double().masked_fill(~keep, -math.inf), dim=1).squeeze()
    counts = torch.bincount(tokens.flatten(), minlength=len(p)).double()
    assert chi_square_excess(counts, p) < 0
    # Neighbouring steps, and neighbouring rows, are independent.
    for pairs in (tokens[:, :-1] * 10 + tokens[:, 1:], tokens[:-1] * 10 + tokens[1:]):
        joint = torch.bincount(pairs.flatten(), minlength=100).double()
        assert chi_square_excess(joint, torch.outer(p, p).flatten()) < 0


def chi_square_excess(counts: Tensor, p: Tensor) -> float:
    """Above 0 where Pearson's statistic passes its 99.9% quantile (Wilson and Hilferty 1931)."""
    assert counts[p == 0].sum() == 0
    rare = p * counts.sum() < 5  # too few for the statistic's distribution: one cell
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    p = torch.cat([p[~rare], p[rare].sum(0, keepdim=True)])
    counts, p = counts[p > 0], p[p > 0]
    expected = p * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(p) - 1
    spread = 2 / (9 * freedom)
    return statistic - freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    ("sampling", "row", "gathers"),
    [
        (Sampling(), 1, 1),
        (Sampling(1.0), 1, 1),
        (Sampling(1.0, top_k=50), 1, 1),
        (Sampling(1.0, top_k=50, top_p=0.9), 1, 1),
        (Sampling(1.0, top_p=0.9), 2, 1),
        (Sampling(1.0, top_p=0.9), 0, 2),  # a flat row: 512 of each rank are not enough
    ],
)
def test_one_collective_chooses_a_token(
    sampling: Sampling, row: int, gathers: int, ranks: RankPool
) -> None:
    for calls in ranks(2, count_calls, sampling, row):
        assert calls == [("all_gather", "sampling")] * gathers


def count_calls(tp: ParallelGroup, sampling: Sampling, row: int) -> list[tuple[str, str]]:
    # Rank 0 holds all the likely tokens.
    logits = make_logits("plain")[row : row + 1].sort(descending=True).values
    partition = Partition.even(VOCAB, tp.size)
    with record(tp) as ledger:
        next_tokens(mine(tp, logits, partition), tp, partition, sampling)
    return [(call.op, call.layer) for call in ledger.calls]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_p=0.5)])
def test_a_logit_that_is_not_a_number_stops_every_rank(sampling: Sampling, ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2, choose_nan, sampling)
    assert [error.partition(" (")[0] for error in caught.value.errors.values()] == [
        "ValueError: the logits are not numbers"
    ] * 2


def choose_nan(tp: ParallelGroup, sampling: Sampling) -> None:
    partition = Partition.even(10, tp.size)
    logits = torch.zeros(2, 10)
    logits[1, 9] = math.nan
    next_tokens(mine(tp, logits, partition), tp, partition, sampling)


def test_logits_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="dimension 1 should be 9, not 8"):
        next_tokens(torch.zeros(1, 8), ParallelGroup.single(), Partition.even(9, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": 1e-9}, "at least 0.0001"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.9}, "temperature=0 always takes the most likely"),
        ({"top_k": 5}, "temperature=0 always takes the most likely"),
    ],
)
def test_settings_outside_their_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)  # type: ignore[arg-type]
