"""A few cases of each kind, and every one that was ever wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.pool import Ranks

# Numbers of seed 0: how many of each kind, at 2 and at 3 ranks.
_CASES = {
    "decoder": 6,
    "generation": 4,
    "pipeline": 4,
    "data_parallel": 3,
    "in_place": 6,
    "hugging_face": 2,
    "checkpoints": 2,
    "layers": 25,
}
_ONCE_WRONG = json.loads(Path(__file__).with_name("once_wrong.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Ranks]]:
    with Ranks(2) as two, Ranks(3) as three, Ranks(4) as four:
        yield {2: two, 3: three, 4: four}


def test_every_kind_is_covered() -> None:
    assert _CASES.keys() == KINDS.keys()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", _CASES)
def test_fixed_cases(pools: dict[int, Ranks], kind: str, ranks: int) -> None:
    words = []
    for number in range(_CASES[kind]):
        verdict = pools[ranks].run(kind, KINDS[kind].draw(ranks, 0, number))
        assert verdict.word != "wrong", (number, verdict.why, verdict.traceback)
        words.append(verdict.word)
    assert words.count("right") >= len(words) / 3, words


@pytest.mark.parametrize("found", _ONCE_WRONG, ids=lambda found: found["what"])
def test_cases_that_were_wrong_once(pools: dict[int, Ranks], found: dict) -> None:
    verdict = pools[found["ranks"]].run(found["kind"], found["case"])
    assert verdict.word == found["now"], (verdict.why, verdict.traceback)
