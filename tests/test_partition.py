from __future__ import annotations

from itertools import pairwise, product

import pytest

from colrow.head_partition import HeadPartition
from colrow.partition import Partition, ShardSpec


def indices(partition: Partition, rank: int) -> set[int]:
    return set(range(*partition.bounds[rank]))


class TestPartition:
    def test_even_gives_the_remainder_to_the_first_ranks(self) -> None:
        assert Partition.even(10, 4).bounds == ((0, 3), (3, 6), (6, 8), (8, 10))
        assert Partition.even(8, 4).sizes == (2, 2, 2, 2)
        assert Partition.even(2, 3).sizes == (1, 1, 0)
        assert Partition.even(0, 2).sizes == (0, 0)

    def test_even_covers_once_with_at_most_one_between_fullest_and_emptiest(self) -> None:
        for length, parts in product(range(0, 40), range(1, 12)):
            partition = Partition.even(length, parts)
            assert partition.parts == parts and partition.length == length
            assert partition.bounds[0][0] == 0 and partition.bounds[-1][1] == length
            assert all(a[1] == b[0] for a, b in pairwise(partition.bounds))
            assert max(partition.sizes) - min(partition.sizes) <= 1
            assert partition.sizes == tuple(sorted(partition.sizes, reverse=True))

    def test_ratio_is_proportional_in_whole_grains(self) -> None:
        assert Partition.ratio(10, [0.5, 0.3, 0.2]).sizes == (5, 3, 2)
        assert Partition.ratio(96, [5, 3, 2], grain=16).sizes == (48, 32, 16)
        assert Partition.ratio(9, [1, 0, 2]).sizes == (3, 0, 6)
        # 7 units in proportion 1:1:2 are 1.75, 1.75, 3.5; those that lose most get the rest.
        assert Partition.ratio(7, [1, 1, 2]).sizes == (2, 2, 3)

    def test_ratio_is_never_a_grain_away_from_the_exact_share(self) -> None:
        for length, grain in product(range(0, 61, 6), (1, 2, 3)):
            for weights in ([1.0], [1, 1], [0.1, 0.2, 0.7], [3, 5, 7, 11], [1e-9, 1.0]):
                partition = Partition.ratio(length, weights, grain=grain)
                assert sum(partition.sizes) == length
                for size, weight in zip(partition.sizes, weights, strict=True):
                    assert size % grain == 0
                    assert abs(size - length * weight / sum(weights)) < grain
        assert Partition.ratio(23, [1.0] * 5).sizes == Partition.even(23, 5).sizes

    def test_replicated_and_from_sizes(self) -> None:
        assert Partition.replicated(5, 3).bounds == ((0, 5),) * 3
        assert Partition.from_sizes([2, 0, 3]).bounds == ((0, 2), (2, 2), (2, 5))
        assert Partition.from_sizes([2, 0, 3]).length == 5

    def test_sizes(self) -> None:
        partition = Partition.from_sizes([2, 0, 3])
        assert [partition.size(rank) for rank in range(3)] == [2, 0, 3] == list(partition.sizes)
        assert partition.largest == 3 and partition.parts == 3

    @pytest.mark.parametrize(
        ("bounds", "shared"),
        [
            (((0, 2), (2, 4)), ()),
            (((0, 2), (1, 3)), ((1, 2),)),
            (((0, 4), (0, 4), (0, 4)), ((0, 4),)),
            (((0, 2), (0, 2), (2, 4), (2, 4)), ((0, 4),)),
            (((0, 2), (1, 4), (3, 6), (6, 6)), ((1, 2), (3, 4))),
            (((0, 6), (1, 1), (2, 3)), ((2, 3),)),
        ],
    )
    def test_shared_is_what_more_than_one_rank_holds(
        self, bounds: tuple[tuple[int, int], ...], shared: tuple[tuple[int, int], ...]
    ) -> None:
        length = max(stop for _, stop in bounds)
        assert Partition(length, bounds).shared == shared

    def test_is_split_when_each_index_has_one_holder_in_rank_order(self) -> None:
        assert Partition.even(7, 3).is_split and Partition.from_sizes([2, 0, 1]).is_split
        assert Partition(5, ((0, 5),)).is_split
        assert not Partition.replicated(4, 2).is_split
        assert not Partition(4, ((0, 3), (2, 4))).is_split
        assert not Partition(4, ((2, 4), (0, 2))).is_split

    def test_scaled_turns_heads_into_rows(self) -> None:
        scaled = Partition(3, ((0, 2), (1, 3))).scaled(8)
        assert scaled == Partition(24, ((0, 16), (8, 24)))

    def test_equal_partitions_are_equal_values(self) -> None:
        assert Partition.even(4, 2) == Partition.from_sizes([2, 2])
        assert hash(Partition.even(4, 2)) == hash(Partition.from_sizes([2, 2]))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Partition(4, ()), "at least one rank"),
            (lambda: Partition(4, ((0, 5),)), r"rank 0 cannot hold \[0, 5\) of a dimension of 4"),
            (lambda: Partition(4, ((0, 4), (3, 2))), r"rank 1 cannot hold \[3, 2\)"),
            (lambda: Partition(4, ((0, 1), (2, 4))), "no rank holds index 1"),
            (lambda: Partition(4, ((0, 3),)), "no rank holds index 3"),
            (lambda: Partition.even(4, 0), "cannot divide a dimension of 4 over 0 ranks"),
            (lambda: Partition.even(-1, 2), "cannot divide a dimension of -1 over 2 ranks"),
            (lambda: Partition.ratio(10, [1, 1], grain=3), "10 is not made of units of 3"),
            (lambda: Partition.ratio(10, [1, 1], grain=0), "units of 0"),
            (lambda: Partition.ratio(10, [1, -1]), r"\[1, -1\] must be finite and non-negative"),
            (lambda: Partition.ratio(10, [0, 0]), "positive sum"),
            (lambda: Partition.ratio(10, [float("nan"), 1]), "ratio .* must be"),
            (lambda: Partition.ratio(10, [float("inf"), 1]), "ratio .* must be"),
            (
                lambda: Partition.from_sizes([3, -1]),
                r"rank 0 cannot hold \[0, 3\) of a dimension of 2",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, make: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()  # type: ignore[operator]


class TestShardSpec:
    def test_a_plain_weight(self) -> None:
        spec = ShardSpec((10, 6), 0, (Partition.even(10, 3),))
        assert [spec.local_shape(rank) for rank in range(3)] == [(4, 6), (3, 6), (3, 6)]
        assert spec.global_ranges(1) == ((4, 7),)
        columns = ShardSpec((10, 6), 1, (Partition.even(6, 4),))
        assert columns.local_shape(0) == (10, 2) and columns.local_shape(3) == (10, 1)

    def test_a_replicated_weight(self) -> None:
        spec = ShardSpec.replicated(10, 6)
        assert spec.dim is None and spec.local_shape(7) == (10, 6)

    def test_a_fused_weight_lies_block_after_block(self) -> None:
        heads = HeadPartition.create(9, 3, 2)
        query, key_value = heads.query.scaled(2), heads.key_value.scaled(2)
        spec = ShardSpec((30, 4), 0, (query, key_value, key_value))
        assert spec.local_shape(0) == (18, 4) and spec.local_shape(1) == (16, 4)
        assert spec.local_offsets(0) == (0, 10, 14) and spec.local_offsets(1) == (0, 8, 12)
        assert spec.global_ranges(0) == ((0, 10), (18, 22), (24, 28))
        assert spec.global_ranges(1) == ((10, 18), (20, 24), (26, 30))

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"blocks of \[5, 4\] do not make up dimension 0"):
            ShardSpec((10, 6), 0, (Partition.even(5, 2), Partition.even(4, 2)))
        with pytest.raises(ValueError, match="no dimension -1"):
            ShardSpec((10, 6), -1, (Partition.even(6, 2),))
        with pytest.raises(ValueError, match="2 and 3 ranks"):
            ShardSpec((10, 6), 0, (Partition.even(5, 2), Partition.even(5, 3)))
