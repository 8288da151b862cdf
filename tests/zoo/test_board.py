"""Verdicts become lines and tables that say what they should."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.zoo.board import markdown, summary, write_markdown
from colrow.verification.comparison import gradient_errors
from colrow.verification.in_place import Outcome

OUTCOMES = [
    Outcome("llama", "causal LM", "colrow", False, 2, "passed", share=1.0, gradient_error=3e-15),
    Outcome("mamba", "causal LM", "colrow", False, 2, "refused", "a | b"),
    Outcome("vit (classifier)", "classifier", "colrow", False, 2, "failed", "loss off by 1e-02"),
    Outcome("llama", "causal LM", "transformers", True, 2, "passed", share=0.5),
]


def test_summary_counts_by_system_and_task() -> None:
    lines = summary(OUTCOMES)
    assert lines[0].startswith("colrow, tp=2, causal LMs: 1 of 2 passed, 1 of them with at least")
    assert "1 refused, 0 failed" in lines[0]
    assert lines[1].startswith("colrow, tp=2, others: 0 of 1 passed")
    assert lines[2].startswith("transformers, even sizes, tp=2, causal LMs: 1 of 1 passed, 0 of")


def test_markdown_has_a_row_for_each_and_escapes() -> None:
    lines = markdown(OUTCOMES).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 8
    assert lines[2] == "| llama | causal LM | passed 100% | passed 50% | 3e-15 |  |  |"
    assert lines[3] == "| mamba | causal LM | refused |  |  |  | a \\| b |"


def test_a_new_scoreboard_replaces_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "zoo.md"
    page.write_text("# The zoo\n\n")
    write_markdown(OUTCOMES[:1], page, "colrow zoo")
    first = page.read_text()
    page.write_text(first + "\nAfter.\n")
    write_markdown(OUTCOMES, page, "colrow zoo")
    text = page.read_text()
    assert text.startswith("# The zoo\n\n<!-- scoreboard -->\n") and text.endswith("\nAfter.\n")
    assert text.count("<!-- scoreboard -->") == 1
    assert text.count("| llama |") == 1 and "| mamba |" in text


def test_gradients_that_are_missing_extra_or_wrong_are_seen() -> None:
    whole = {"a": torch.ones(4), "b": torch.ones(2), "zero": torch.full((2,), 1e-30).double()}
    assert max(gradient_errors(dict(whole), whole).values()) == 0
    assert gradient_errors({**whole, "a": torch.ones(4) * 1.1}, whole)["a"] > 0.09
    assert gradient_errors({"a": whole["a"], "zero": whole["zero"]}, whole)["b"] == float("inf")
    assert gradient_errors({**whole, "c": torch.ones(1)}, whole)["c"] == float("inf")
    assert gradient_errors({"a": whole["a"], "b": whole["b"]}, whole)["zero"] == 0
    # Rounding of what is 0 in exact arithmetic is no error.
    assert (
        gradient_errors({**whole, "zero": torch.full((2,), 1e-17).double()}, whole)["zero"] < 1e-10
    )
