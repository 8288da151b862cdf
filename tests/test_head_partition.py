from __future__ import annotations

from itertools import product

import pytest

from colrow.head_partition import HeadPartition
from tests.test_partition import indices


def test_nine_query_and_three_kv_heads_on_two_ranks() -> None:
    heads = HeadPartition.create(9, 3, 2)
    assert heads.query.bounds == ((0, 5), (5, 9))
    assert heads.key_value.bounds == ((0, 2), (1, 3))
    assert heads.key_value.shared == ((1, 2),)
    assert heads.runs(0) == (((0, 3), (0, 1)), ((3, 5), (1, 2)))
    assert heads.runs(1) == (((0, 1), (0, 1)), ((1, 4), (1, 2)))


def test_eight_kv_heads_on_sixteen_ranks() -> None:
    for num_heads in (16, 32, 64):
        heads = HeadPartition.create(num_heads, 8, 16)
        assert heads.query.sizes == (num_heads // 16,) * 16
        assert heads.key_value.bounds == tuple((r // 2, r // 2 + 1) for r in range(16))


def test_five_heads_on_three_ranks() -> None:
    heads = HeadPartition.create(5, 5, 3)
    assert heads.query.sizes == (2, 2, 1)
    assert heads.key_value == heads.query


def test_multi_query_attention_replicates_its_head() -> None:
    heads = HeadPartition.create(5, 1, 4)
    assert heads.key_value.bounds == ((0, 1),) * 4
    assert heads.group_size == 5
    assert [heads.runs(rank) for rank in range(4)] == [
        (((0, 2), (0, 1)),),
        (((0, 1), (0, 1)),),
        (((0, 1), (0, 1)),),
        (((0, 1), (0, 1)),),
    ]


def test_by_weights() -> None:
    heads = HeadPartition.create(12, 4, 2, weights=[2, 1])
    assert heads.query.sizes == (8, 4)
    assert heads.key_value.bounds == ((0, 3), (2, 4))


def test_every_query_head_finds_its_kv_head() -> None:
    for kv_heads, group, parts in product(range(1, 9), range(1, 6), range(1, 17)):
        num_heads = kv_heads * group
        if parts > num_heads:
            continue
        heads = HeadPartition.create(num_heads, kv_heads, parts)
        assert max(heads.query.sizes) - min(heads.query.sizes) <= 1
        for rank in range(parts):
            read = {q // group for q in indices(heads.query, rank)}
            assert indices(heads.key_value, rank) == read


def test_runs_cover_the_local_heads_exactly_and_pair_them_right() -> None:
    for kv_heads, group, parts in product(range(1, 7), range(1, 6), range(1, 9)):
        num_heads = kv_heads * group
        if parts > num_heads:
            continue
        heads = HeadPartition.create(num_heads, kv_heads, parts)
        for rank in range(parts):
            q_start, kv_start = heads.query.bounds[rank][0], heads.key_value.bounds[rank][0]
            runs = heads.runs(rank)
            assert len(runs) <= 3
            covered = []
            for (q0, q1), (kv0, kv1) in runs:
                each, rest = divmod(q1 - q0, kv1 - kv0)
                assert rest == 0
                for q in range(q0, q1):
                    kv = kv0 + (q - q0) // each
                    assert kv_start + kv == (q_start + q) // group
                    covered.append(q)
            assert covered == list(range(heads.query.size(rank)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 2, 1), "9 query heads cannot share 2 KV heads equally"),
        ((0, 1, 1), "0 query heads"),
        ((4, 0, 1), "0 KV heads"),
        ((4, 2, 5), "4 query heads cannot be split over 5 ranks.* at most 4"),
        ((4, 2, 0), "over 0 ranks"),
    ],
)
def test_impossible_counts(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadPartition.create(*arguments)


def test_impossible_weights() -> None:
    with pytest.raises(ValueError, match=r"\[100, 1\] leaves a rank without any of 4"):
        HeadPartition.create(4, 2, 2, weights=[100, 1])
    with pytest.raises(ValueError, match=r"\[1, 1, 1\] does not have one share for 2 ranks"):
        HeadPartition.create(4, 2, 2, weights=[1, 1, 1])
