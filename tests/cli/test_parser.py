"""What is typed wrong gets one line that helps; help fits a terminal and shows what is common."""

from __future__ import annotations

import pkgutil

import pytest

import colrow.cli
from colrow.cli import main
from colrow.cli.parser import did_you_mean

COMMANDS = sorted(
    module.name
    for module in pkgutil.iter_modules(colrow.cli.__path__)
    if module.name not in colrow.cli._NOT_COMMANDS
)


def test_colrow_alone_is_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone
    assert all(f"\n    {name}" in alone for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "m", "Hi", "--max-tokens", "5"], "did you mean --max-new-tokens? (see"),
        (["train", "--lr", "1e-3"], "did you mean --learning-rate?"),
        (["train", "--batch-size=3"], "did you mean --global-batch?"),
        (["convert", "a", "b", "--too", "hf"], "are required: --to; did you mean --to?"),
        (["plan", "gpt2", "--zzz"], "unrecognized arguments: --zzz (see colrow plan --help)"),
        (["verify", "m", "n", "--tp", "2"], "unrecognized arguments: n (see colrow verify --help)"),
        (["generat", "m"], "there is no command 'generat'; did you mean generate? (see colrow -"),
        (["xyz"], "there is no command 'xyz'; there are bench, "),
    ],
)
def test_a_near_name_is_offered(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_near_names() -> None:
    known = ["--max-new-tokens", "--learning-rate", "--tp", "--global-batch", "--microbatch"]
    assert did_you_mean("--max_new_tokens", known) == "; did you mean --max-new-tokens?"
    assert did_you_mean("--quantise", known) == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_and_keeps_rare_options_back(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = colrow.cli._parser([name])._subparsers._group_actions[0].choices[name]
    rare = parser._rare
    assert rare <= {action.dest for action in parser._actions}
    assert main([name, "--help"]) == 0
    common = capsys.readouterr().out
    assert common.startswith(f"usage: colrow {name} ")
    assert max(map(len, common.splitlines())) <= 80
    options = {option for option in parser.options if f" {option}" in common}
    hidden = {a.option_strings[0] for a in parser._actions if a.dest in rare}
    assert len(options) <= 40
    assert (f"colrow {name} --help-all\n" in common) == bool(rare)
    if rare:
        assert not any(f"\n  {option} " in common for option in hidden)
        assert main([name, "--help-all"]) == 0
        everything = capsys.readouterr().out
        assert max(map(len, everything.splitlines())) <= 80
        assert all(f"{option}" in everything for option in hidden)


def test_what_has_a_heading_is_a_setting_of_training() -> None:
    from dataclasses import fields

    from colrow.cli.train import _GROUPS, _RARE
    from colrow.train.settings import TrainSettings

    grouped = [name for names in _GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(set(grouped))
    assert set(_RARE) <= set(grouped) <= {entry.name for entry in fields(TrainSettings)}
