"""The fuzz itself: cases repeat, become small, and what ranks raise is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.zoo.pool import Raised, TaskFailure
from tests.fuzz.__main__ import main
from tests.fuzz.campaign import command_for
from tests.fuzz.case import Fields, OneOf, Several
from tests.fuzz.kinds import KINDS
from tests.fuzz.pool import Ranks, judged, why_unclear
from tests.fuzz.shrink import shrunk


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_plain_data_that_repeats(kind: str) -> None:
    cases = [KINDS[kind].draw(3, 7, number) for number in range(20)]
    assert cases == [KINDS[kind].draw(3, 7, number) for number in range(20)]
    assert cases != [KINDS[kind].draw(3, 8, number) for number in range(20)]
    assert json.loads(json.dumps(cases)) == cases
    assert command_for(2, kind, cases[0]).startswith(".venv/bin/python -m tests.fuzz --ranks 2")


def test_shrinking_leaves_what_matters() -> None:
    fields = Fields(
        {
            "a": OneOf([1, 2, 3, 4]),
            "b": OneOf([False, True]),
            "items": Several(Fields({"x": OneOf([0, 5, 7]), "y": OneOf([0, 1])}), most=4),
        }
    )
    case = {"a": 4, "b": True, "items": [{"x": 5, "y": 1}, {"x": 7, "y": 1}, {"x": 0, "y": 1}]}

    def fails(case: dict) -> bool:
        return case["a"] > 2 and any(item["x"] == 7 for item in case["items"])

    small = shrunk(case, fields, fails, seconds=5)
    assert small == {"a": 3, "b": False, "items": [{"x": 7, "y": 0}]}
    assert shrunk(case, fields, fails, seconds=5, most=0) == case


def _raised(type_name: str, message: str, file: str, line: str) -> Raised:
    return Raised(0, type_name, message, f'  File "{file}", line 3, in run\n    {line}\n')


def test_what_counts_as_a_refusal() -> None:
    import colrow

    ours = str(Path(colrow.__file__).parent / "mesh.py")
    sentence = "tp=3: a size that this model does not have"
    good = _raised("ValueError", sentence, ours, "raise ValueError(")
    assert not why_unclear(good)
    assert judged(TaskFailure("", good, on_all_ranks=True)).word == "refused"
    assert judged(TaskFailure("", good)).word == "wrong"
    assert judged(TaskFailure("not done after 9 s")).word == "wrong"
    for bad in (
        _raised("IndexError", sentence, ours, "raise IndexError("),
        _raised("ValueError", sentence, "torch/nn/functional.py", "raise ValueError("),
        _raised("RuntimeError", sentence, ours, "y = x @ weight"),
        _raised("ValueError", "3", ours, "raise ValueError("),
        _raised("ValueError", "the ranks were given different batches", ours, "raise ValueError("),
    ):
        assert why_unclear(bad)
        assert judged(TaskFailure("", bad, on_all_ranks=True)).word == "wrong"


@pytest.mark.parametrize(
    "arguments", ["--only nothing", "--ranks 1", "--only layers:x", "--case a"]
)
def test_bad_usage_is_one_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_wrong_number_a_hang_and_a_crash_are_found() -> None:
    with Ranks(2, seconds_per_case=8) as pool:
        for does, why in [
            ("right", ""),
            ("wrong number", "rank 1 says so"),
            ("raises alone", "rank 1 alone raised ValueError: only here"),
            ("hangs", "not done after 8 s"),
            ("dies", "rank 1 died (3)"),
            ("right", ""),
        ]:
            verdict = pool.run("pretended", {"does": does})
            assert verdict.word == ("wrong" if why else "right"), verdict
            assert verdict.why == ([why] if why else [])
