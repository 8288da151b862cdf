from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from colrow.comm.group import ParallelGroup
from tests.ranks import RankError, RankPool


def add_up(tp: ParallelGroup, number: float) -> tuple[int, int, float, int]:
    total = torch.tensor(number + tp.rank)
    if tp.group is not None:
        dist.all_reduce(total, group=tp.group)
    return tp.rank, tp.size, total.item(), os.getpid()


def reject(tp: ParallelGroup) -> None:
    raise ValueError(f"no rank of {tp.size} takes this")


def fail_on_rank_1(tp: ParallelGroup, how: str) -> None:
    if tp.rank == 1:
        if how == "die":
            os._exit(7)
        if how == "sleep":
            time.sleep(60)
        raise LookupError("only here")
    dist.all_reduce(torch.ones(1), group=tp.group)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_pool_runs_on_n_ranks(ranks: RankPool, n: int) -> None:
    total = sum(0.5 + rank for rank in range(n))
    results = ranks(n, add_up, 0.5)
    assert [result[:3] for result in results] == [(rank, n, total) for rank in range(n)]


def test_an_error_of_all_ranks_keeps_the_pool(ranks: RankPool) -> None:
    before = ranks(1, add_up, 0.0)
    with pytest.raises(RankError, match="no rank of 2 takes this") as caught:
        ranks(2, reject)
    assert sorted(caught.value.errors) == [0, 1]
    assert ranks(1, add_up, 0.0) == before


def call_what_is_deprecated(tp: ParallelGroup) -> None:
    warnings.warn("use the new name", FutureWarning, stacklevel=1)


def test_what_others_have_given_up_is_an_error_in_the_ranks(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="FutureWarning: use the new name"):
        ranks(1, call_what_is_deprecated)
    with pytest.raises(FutureWarning, match="use the new name"):
        call_what_is_deprecated(ParallelGroup.single())


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    """A pool of its own: what others have imported in theirs is not lost, nor four ranks begun."""
    pool = RankPool(size=2)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"LookupError: only here"),
        ("die", r"rank 1 died with exit code 7|ranks \[1\]|Connection closed by peer"),
        ("sleep", r"ranks \[0, 1\] were not done after 1 s"),
    ],
)
def test_a_pool_that_broke_starts_anew(pair: RankPool, how: str, message: str) -> None:
    before = pair(1, add_up, 0.0)
    with pytest.raises(RankError, match=message):
        pair(2, fail_on_rank_1, how, timeout=1 if how == "sleep" else 30)
    assert pair(2, add_up, 0.0)[0][3] != before[0][3]
