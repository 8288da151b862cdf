from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import colrow.cli
from colrow.cli import main
from colrow.cli.common import warn_of_cores, write_json

PROBE = """
HELP = "fails in a chosen way"
DESCRIPTION = "Fails."

def add_arguments(parser):
    from colrow.cli.common import add_dtype, add_json, add_tp
    parser.add_argument("how")
    add_tp(parser)
    add_dtype(parser)
    add_json(parser)

def run(args):
    from colrow.cli.common import run_on_ranks, write_json
    if args.how == "interrupt":
        raise KeyboardInterrupt
    if args.how == "terminal":
        raise ValueError("a\\n\\x1b[31mb\\u202e, \u00e9")
    if args.how == "open":
        open("no/such/file")
    value = run_on_ranks(int, args.how, ranks=args.tp)
    write_json({"value": value}, args.json or "-")
    return 0
"""


@pytest.fixture(autouse=True)
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command of its own file, as every command is."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setattr(colrow.cli, "__path__", [*colrow.cli.__path__, str(tmp_path)])
    yield
    sys.modules.pop("colrow.cli.probe", None)


def test_a_command_runs_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "7"]) == 0
    assert capsys.readouterr().out == '{\n  "value": 7\n}\n'
    assert main(["probe", "7", "--tp", "2", "--json", str(tmp_path / "out.json")]) == 0
    assert '"value": 7' in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["probe", "x"], "colrow probe: invalid literal for int() with base 10: 'x'"),
        # The same from a rank's process.
        (["probe", "x", "--tp", "2"], "colrow probe: invalid literal for int() with base 10: 'x'"),
        # What a terminal would obey is shown instead.
        (["probe", "terminal"], r"colrow probe: a \x1b[31mb\u202e, é"),
        (["probe", "open"], "colrow probe: no/such/file: No such file or directory"),
        (
            ["probe", "1", "--tp", "0"],
            "colrow probe: argument --tp: '0' is not a whole number of at least 1 "
            "(see colrow probe --help)",
        ),
        (
            ["probe", "1", "--tpp", "2"],
            "colrow probe: unrecognized arguments: --tpp 2; did you mean --tp? "
            "(see colrow probe --help)",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_what_json_cannot_say_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"errors": {"a": math.nan, "b": 1.5}, "pairs": [(math.inf, True)]}, "-")
    written = json.loads(capsys.readouterr().out)
    assert written == {"errors": {"a": None, "b": 1.5}, "pairs": [[None, True]]}


def test_more_ranks_than_cores_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("colrow.cli.common.available_cores", lambda: 2)
    warn_of_cores(2)
    assert capsys.readouterr().err == ""
    warn_of_cores(3)
    said = "... 3 ranks share 2 cores and wait for each other: ask for 2 to be faster\n"
    assert capsys.readouterr().err == said


def test_an_interrupt_is_130() -> None:
    assert main(["probe", "interrupt"]) == 130


def test_help_and_version_do_without_torch() -> None:
    code = (
        "import sys\nfrom colrow.cli import main\n"
        "assert main(['--help']) == main(['--version']) == 0\n"
        "assert 'torch' not in sys.modules, 'colrow --help imported torch'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: colrow" in result.stdout
