"""A run of the zoo that was stopped goes on where it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.zoo.store import Store
from colrow.cli import main
from colrow.tiny_models.architectures import Architecture
from colrow.verification.in_place import Outcome

LLAMA = Outcome("llama", "causal LM", "colrow", False, 2, "passed", share=1.0)


def test_outcomes_are_found_again_by_system_sizes_and_ranks(tmp_path: Path) -> None:
    file = tmp_path / "zoo.jsonl"
    store = Store(file)
    store.add(LLAMA)
    store.add(Outcome("gpt2", "causal LM", "colrow", False, 2, "failed", "died"))
    store.add(Outcome("gpt2", "causal LM", "colrow", False, 2, "passed"))
    again = Store(file)
    assert again.find(Architecture("llama"), "colrow", 2) == LLAMA
    assert again.find(Architecture("llama"), "colrow", 3) is None
    assert again.find(Architecture("llama"), "transformers", 2) is None
    assert again.find(Architecture("llama", even=True), "colrow", 2) is None
    store.add(Outcome("opt", "causal LM", "transformers", True, 2, "passed"))
    assert Store(file).find(Architecture("opt"), "transformers", 2) is None
    assert Store(file).find(Architecture("opt", even=True), "transformers", 2) is not None
    newest = again.find(Architecture("gpt2"), "colrow", 2)
    assert newest is not None and newest.verdict == "passed"


def test_the_command_runs_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run_zoo(architectures: list[Architecture], tp: int, system: str, **rest: object) -> None:
        asked.extend(f"{a.name} by {system}" for a in architectures)
        for a in architectures:
            rest["progress"](Outcome(a.name, a.task, system, a.even, tp, "passed"))  # type: ignore[operator]

    monkeypatch.setattr("benchmarks.zoo.board.run_zoo", run_zoo)
    file = tmp_path / "zoo.jsonl"
    Store(file).add(LLAMA)
    assert main(["zoo", "--only", "llama,gpt2", "--tp", "2", "--resume", str(file)]) == 0
    assert asked == ["gpt2 by colrow", "gpt2 by generate", "llama by generate"]
    assert "colrow, tp=2, causal LMs: 2 of 2 passed" in capsys.readouterr().out
    assert main(["zoo", "--only", "llama,gpt2", "--tp", "2", "--resume", str(file)]) == 0
    assert len(asked) == 3


def test_another_file_is_not_taken_for_outcomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "zoo.json"
    file.write_text("[]\n")
    assert main(["zoo", "--only", "llama", "--resume", str(file)]) == 2
    error = capsys.readouterr().err
    assert "line 1: not an outcome" in error and error.count("\n") == 1
