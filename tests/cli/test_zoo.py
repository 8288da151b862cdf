"""``colrow zoo`` and the in-place modes of ``colrow verify``, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colrow.cli import main
from colrow.tiny_models.architectures import Architecture, build


@pytest.mark.slow
def test_zoo_writes_the_scoreboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, page = tmp_path / "zoo.json", tmp_path / "zoo.md"
    only = "llama,gemma4_assistant"
    code = main(["zoo", "--only", only, "--tp", "2", "--json", str(data), "--markdown", str(page)])
    assert code == 0
    outcomes = {o["name"]: o for o in json.loads(data.read_text())}
    assert outcomes["llama"]["verdict"] == "passed" and outcomes["llama"]["greedy"]
    assert outcomes["gemma4_assistant"]["verdict"] == "not run"
    text = page.read_text()
    assert f"colrow zoo --only {only} --tp 2 --markdown" in text
    assert "| llama | causal LM | passed" in text
    printed = capsys.readouterr().out
    assert "colrow, tp=2, causal LMs: 1 of 1 passed" in printed


@pytest.mark.slow
def test_verify_takes_an_architecture_and_a_saved_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--architecture", "gpt2", "--tp", "2", "--dtype", "fp64"]) == 0
    assert "PASSED" in capsys.readouterr().out
    report = tmp_path / "report.json"
    for architecture in (Architecture("bert", "AutoModelForMaskedLM"), Architecture("gemma")):
        saved = tmp_path / architecture.model_type
        build(architecture).save_pretrained(saved)
        assert main(["verify", str(saved), "--tp", "2", "--json", str(report)]) == 0
        (outcome,) = json.loads(report.read_text())
        assert outcome["name"] == architecture.name and outcome["verdict"] == "passed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zoo", "--tp", "1"], "at least 2"),
        (["zoo", "--tp", "two"], "at least 2"),
        (["zoo", "--only", "lama"], "no architecture lama"),
        (["verify", "--tp", "2"], "either MODEL or --architecture"),
        (["verify", "somewhere", "--architecture", "llama"], "either MODEL or --architecture"),
        (["verify", "--architecture", "lama"], "did you mean llama"),
        (["verify", "--architecture", "llama", "--tp", "1"], "at least 2"),
        (["verify", "--architecture", "llama", "--dtype", "bf16"], "fp32 or fp64"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_a_clone_the_zoo_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("colrow.cli.zoo.__file__", str(tmp_path / "lib/colrow/cli/zoo.py"))
    assert main(["zoo", "--only", "llama"]) == 2
    assert "run it in a clone of the repository" in capsys.readouterr().err
    assert main(["zoo", "--only", "llama", "--list"]) == 0
    assert capsys.readouterr().out == "llama\n"
