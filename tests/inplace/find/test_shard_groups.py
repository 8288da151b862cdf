"""Which features must stay on one rank, and who holds them."""

import random

import pytest

from colrow.inplace.find.shard_groups import (
    connected,
    distribute,
    holders,
    indices_of,
    members,
    spec_of_rows,
)


def test_what_is_reached_in_common_belongs_together() -> None:
    # Two query heads of two features that one key reaches, and a head of its own.
    assert connected(6, [0b000011, 0b001100, 0b001111, 0b110000]) == [0b001111, 0b110000]
    assert connected(3, [0b010]) == [0b001, 0b010, 0b100]


def test_ranks_get_neighbours_or_every_other_group() -> None:
    groups = [0b0001, 0b0010, 0b0100, 0b1000]
    assert [members(s) for s in distribute(groups, 2)] == [[0, 1], [2, 3]]
    assert [members(s) for s in distribute(groups, 2, strided=True)] == [[0, 2], [1, 3]]


def test_rows_go_to_every_rank_that_they_reach() -> None:
    assert holders([0b01, 0b10, 0b11, 0], [0b01, 0b10]) == [[0, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize("seed", range(40))
def test_any_rows_make_a_spec(seed: int) -> None:
    draw = random.Random(seed)
    length, ranks = draw.randint(1, 12), draw.randint(1, 4)
    rows = [sorted(draw.sample(range(length), draw.randint(0, length))) for _ in range(ranks)]
    missing = set(range(length)) - {i for held in rows for i in held}
    rows[0] = sorted({*rows[0], *missing})
    spec = spec_of_rows((2, length), 1, rows)
    assert [indices_of(spec, rank) for rank in range(ranks)] == rows
