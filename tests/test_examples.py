from __future__ import annotations

import ast
import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TAUGHT = (
    "column_and_row",
    "column_then_row_mlp",
    "layer_all_reduces",
    "where_time_goes",
    "hybrid_tp_dp",
    "three_mistakes",
)
TRAINING = ("train_your_own", "finetune_transformers")  # run by tests/train
IN_PLACE = ("parallelize_your_own", "trainer_transformers")


def run(name: str) -> str:
    """What the example prints, on one line; it must exit with 0, and Python must not warn."""
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Warning" not in ended.stderr
    return " ".join(ended.stdout.split())


@pytest.fixture
def shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """As :func:`run`, in this process: what stands last in the script is run in its module."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def shown(name: str) -> str:
        file = EXAMPLES / f"{name}.py"
        module = importlib.import_module(f"examples.{name}")
        script = ast.Module(ast.parse(file.read_text()).body[-1:], [])
        try:
            exec(compile(script, file, "exec"), {**vars(module), "__name__": "__main__"})
        except SystemExit as stop:
            assert not stop.code, capfd.readouterr()
        out, error = capfd.readouterr()
        assert "Warning" not in error
        return " ".join(out.split())

    return shown


def cells(output: str, first: str) -> list[str]:
    """The other cells of the table row that begins with ``first``."""
    return [cell.strip() for cell in output.split(f"│ {first} ")[1].split("│")[1:]]


def test_column_and_row_agree_with_the_dense_layers() -> None:
    output = run("column_and_row")
    assert "ColumnParallelLinear(weight=[7, 6], local=[4, 6], tp_rank=0/2, bias=True)" in output
    assert "RowParallelLinear(weight=[6, 7], local=[6, 4], tp_rank=0/2, bias=True)" in output
    assert "sent: column: all_reduce in backward, row: all_reduce in forward" in output
    for check in ("column: x gradient", "row: y", "row: weight gradient"):
        assert float(cells(output, check)[2]) < 1e-12
    assert cells(output, "column: y")[:2] == ["[3, 4]", "[3, 7]"]  # concatenated, not cut out
    assert cells(output, "row: weight gradient")[:2] == ["[6, 4]", "[6, 7]"]


def test_column_then_row_sends_half_the_collectives(shown: Callable[[str], str]) -> None:
    output = shown("column_then_row_mlp")
    # Each rank sends [256, 384] floats twice; gathering, (0.5 + 1) x [256, 384 + 1536] floats.
    assert cells(output, "column_then_row, 1 rank")[:2] == ["0", "0.00"]
    assert cells(output, "column_then_row, 2 ranks")[:2] == ["2", f"{2 * 256 * 384 * 4 / 1e6:.2f}"]
    gathering = f"{1.5 * 256 * (384 + 1536) * 4 / 1e6:.2f}"
    assert cells(output, "gather_after_each, 2 ranks")[:2] == ["4", gathering]


def test_a_layer_all_reduces_twice_in_each_direction(shown: Callable[[str], str]) -> None:
    output = shown("layer_all_reduces")
    plain, sequence_parallel = output.split("sequence parallelism on")
    assert re.findall(r"(forward|backward) │ │ (\d) in all │ │ ([\d,]+)", plain) == [
        ("forward", "2", "786,432"),
        ("backward", "2", "786,432"),
    ]
    assert re.findall(r"(forward|backward) │ │ (\d) in all │ │ ([\d,]+)", sequence_parallel) == [
        ("forward", "4", "786,432"),
        ("backward", "4", "786,432"),
    ]
    assert plain.count("all_reduce │ 262,144") == 4
    assert sequence_parallel.count("all_gather │ 262,144") == 4
    assert sequence_parallel.count("reduce_scatter │ 262,144") == 4
    assert output.count("predicted and recorded: the same; by hand: 262,144 bytes each") == 2


def test_where_time_goes_adds_up(shown: Callable[[str], str]) -> None:
    output = shown("where_time_goes")
    shares = re.findall(r"tp=(\d) .*?(\d+)% matmul, (\d+)% waiting .*? hidden\) ([#=.]+)", output)
    assert [tp for tp, *_ in shares] == ["1", "2", "4"]
    for tp, matmul, waiting, bar in shares:
        assert int(matmul) > 0 and int(matmul) + int(waiting) <= 100
        assert abs(bar.count("#") - 0.6 * int(matmul)) <= 1
        assert (bar.count("=") == 0) or int(tp) > 1


def test_hybrid_is_the_step_of_one_process(shown: Callable[[str], str]) -> None:
    output = shown("hybrid_tp_dp")
    for what in ("loss", "gradients", "weights after the step"):
        assert float(cells(output, what)[0]) < 1e-12
    assert "rank 0 holds 33,072 of 59,376 parameters" in output
    assert "sent 6 collectives in backward" in output


def test_each_mistake_is_refused_or_shown_to_be_wrong(shown: Callable[[str], str]) -> None:
    output = shown("three_mistakes")
    assert output.count("ValueError: ") == 5
    assert "expects this rank's 6 of 12 input features" in output
    numbers = [
        (float(wrong), float(right))
        for wrong, right in re.findall(r"wrong: (-?[\d.]+), right: (-?\d+\.\d+)", output)
    ]
    assert len(numbers) == 3
    bias, loss = numbers[1], numbers[2]
    assert bias[0] - bias[1] == pytest.approx(5 * 8, abs=1e-3)  # a bias of ones, once too often
    assert loss[0] - loss[1] == pytest.approx(math.log(2), abs=1e-3)


def test_an_example_can_be_read_at_a_glance() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert max(lengths.values()) <= 80, lengths


def test_the_table_lists_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert re.findall(r"^\| \[(\w+)\.py\]", table, re.MULTILINE) == [*TAUGHT, *TRAINING, *IN_PLACE]
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*TAUGHT, *TRAINING, *IN_PLACE, "demo"}
