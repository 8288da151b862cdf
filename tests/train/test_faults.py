"""``colrow train`` as a person runs it, and what happens to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colrow.cli import main
from tests.ranks import child_ranks
from tests.train.curves import OPTIONS, logged, settings_for, write_inputs

MESSAGE_SECONDS = 20  # within which the others have stopped


def command(directory: Path, output: str = "run", **options: Any) -> list[str]:
    """The words of a ``colrow train`` into this folder of the directory."""
    words = ["--model", directory / "config.json", "--data", directory / "topics.txt"]
    words += ["--output", directory / output, "--token-cache", directory / "tokens"]
    for name, value in {**OPTIONS, "log_every": 1, **options}.items():
        option = "--" + name.replace("_", "-")
        words += [option] if value is True else [option, value]
    return ["train", *map(str, words)]


class Run:
    """A ``colrow train`` in a process of its own."""

    def __init__(self, directory: Path, output: str = "run", **options: Any) -> None:
        self.output = directory / output
        self.process = subprocess.Popen(
            [sys.executable, "-m", "colrow.cli", *command(directory, output, **options)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> str:
        """Reads its messages up to the one that matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line matches {pattern!r}:\n" + "\n".join(self.lines))

    def end(self) -> int:
        """Waits for it; its exit code."""
        assert self.process.stderr is not None
        self.lines += [line.rstrip() for line in self.process.stderr]
        return self.process.wait()

    def kill_a_rank(self, which: int = -1) -> float:
        """SIGKILL to one of its ranks; when."""
        ranks = child_ranks(self.process.pid)
        os.kill(ranks[which], signal.SIGKILL)
        return time.monotonic()


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    """All boxes in the files of a checkpoint."""
    directory = output / "checkpoints" / f"step-{step:08d}"
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


@pytest.mark.parametrize("how", [{}, pytest.param({"in_place": True}, marks=pytest.mark.slow)])
def test_a_killed_rank_stops_the_others_and_the_run_continues(
    inputs: Path, capsys: pytest.CaptureFixture[str], how: dict[str, bool]
) -> None:
    from colrow.train.loop import train

    run = Run(inputs, tp=2, steps=10**6, save_every=2, keep=2, **how)
    run.until("step 7/")  # a save waits for the one before, so that step 4 is on disk
    killed = run.kill_a_rank()
    assert run.end() == 1
    assert time.monotonic() - killed < MESSAGE_SECONDS
    assert "rank 1 was killed by SIGKILL" in run.lines[-1]
    train(settings_for(inputs, "run", steps=10, save_every=2, **how))  # in one process
    continued = re.search(r"continuing after step (\d+)", capsys.readouterr().err)
    assert continued is not None and continued[1] in {"4", "6", "8"}
    assert weights(run.output, 10)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_stops(
    inputs: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(inputs, tp=2, steps=10**6, save_every=10**6)
    run.until("step 3/")
    assert main(command(inputs, tp=1, steps=1)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"is in use by another run (process {run.process.pid} " in said
    assert "train in another --output" in said
    if number == signal.SIGINT:  # as a terminal sends it
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    code = run.end()
    assert code in (-number, 128 + number)
    saved = next(line for line in run.lines if "saved after step" in line)
    step = int(saved.split()[-1])
    assert (run.output / "checkpoints" / f"step-{step:08d}" / "index.json").is_file()
    assert number.name in saved


@pytest.mark.slow
def test_a_restart_ends_as_if_nothing_had_happened(inputs: Path) -> None:
    options: dict[str, Any] = {"tp": 2, "steps": 12, "save_every": 2, "max_restarts": 1}
    whole = Run(inputs, "whole", **options)
    assert whole.end() == 0
    run = Run(inputs, "killed", **options)
    run.until("step 7/")
    run.kill_a_rank(0)
    run.until("restart 1 of 1")
    assert run.end() == 0
    expected, found = weights(whole.output, 12), weights(run.output, 12)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    def losses(of: Run) -> list[tuple[int, float]]:
        lines = (of.output / "log.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"]) for r in map(json.loads, lines[1:])]

    assert losses(run) == losses(whole)
    assert [step for step, _ in losses(run)] == list(range(1, 13))


def test_a_step_that_is_not_finite_stops_the_run(
    inputs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"learning_rate": 1e30, "warmup_steps": 0, "save_every": 1}
    assert main(command(inputs, tp=2, steps=100, **options)) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert "not all numbers are finite" in said
    assert "rank " in said


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"global_batch": 6, "dp": 2}, "global_batch=6 is not a multiple of dp x microbatch"),
    "heads": ({"tp": 7}, "3 query heads cannot be split over 7 ranks"),
    "text": ({"data": "/nowhere.txt"}, "there is no text at '/nowhere.txt'"),
    "tokenizer": ({"tokenizer": ""}, "has no tokenizer: give --tokenizer"),
    "short": ({"sequence": 10**7}, "not enough for one sequence"),
    "output": ({"output": __file__}, "is a file: name a directory"),
    "precision": ({"precision": "fp8"}, "invalid choice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_line(
    inputs: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = BAD[name]
    given = {
        "model": inputs / "config.json",
        "data": inputs / "topics.txt",
        "output": inputs / "run",
        **OPTIONS,
        **options,
    }
    words = [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_run_does_not_continue_on_other_data(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from colrow.train.loop import train

    train(settings_for(inputs, "run", steps=1))
    with pytest.raises(ValueError, match=r"was made with seed=0, not 1: continue with that"):
        train(settings_for(inputs, "run", steps=2, seed=1))
    (inputs / "topics.txt").write_text("another text, " * 2000)
    with pytest.raises(ValueError, match=r"was made with data="):
        train(settings_for(inputs, "run", steps=2))
    assert len(logged(settings_for(inputs, "run"))) == 1


def test_settings_go_through_toml(inputs: Path) -> None:
    from colrow.train.settings import load_settings, to_toml

    settings = settings_for(inputs, 'a "quoted" run', tp=2, learning_rate=1e-4, fsdp=True)
    file = inputs / "settings.toml"
    file.write_text(to_toml(settings))
    assert load_settings(file, {}) == settings
    assert load_settings(file, {"tp": 4}).tp == 4
    file.write_text("tp = 'two'")
    with pytest.raises(ValueError, match=r"tp='two' should be of type int"):
        load_settings(file, {})
    file.write_text("heads = 2")
    with pytest.raises(ValueError, match="unknown setting 'heads'"):
        load_settings(file, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = nan", "learning_rate=nan: must be a finite number"),
        ("clip = inf", "clip=inf: must be a finite number"),
        ("timeout_seconds = 1e999", "timeout_seconds=inf: must be a finite number"),
        ("tp = 1000000000", "tp=1000000000: must be at most 65536"),
        ("sequence = 1000000000000", "sequence=1000000000000: must be at most"),
        ("steps = 10000000000000", "steps=10000000000000: must be at most"),
        ("steps = " + "9" * 10_000, "a whole number of 10000 digits"),
        ("tp = " + "[" * 100_000, "nested more than 100 deep"),
        ("tp" + ".a" * 50_000 + " = 1", "a key of more than 32 parts"),
        ("tp = 1\n# " + "x" * (1 << 18), "larger than 262144 bytes"),
    ],
    ids=lambda text: text[:20],
)
def test_settings_that_no_run_has(text: str, message: str, tmp_path: Path) -> None:
    from colrow.train.settings import load_settings

    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(file, {"model": "m", "data": "d", "output": str(tmp_path / "o")})


def test_a_size_on_the_command_line_replaces_the_layout_of_the_file(inputs: Path) -> None:
    from colrow.train.settings import load_settings, to_toml

    file, said = inputs / "settings.toml", list[str]()
    before = settings_for(inputs, "run", tp=2, dp=2, sequence_parallel=True, tensor_split="2,1")
    file.write_text(to_toml(before))
    found = load_settings(file, {"tp": 1, "pp": 2}, said.append)
    assert (found.tp, found.dp, found.pp, found.ranks) == (1, 1, 2, 2)
    assert (found.sequence_parallel, found.tensor_split) == (False, "")
    assert said[0].startswith(
        "the layout is that of the command line (--pp, --tp): pp 2 x dp 1 x tp 1; "
    )
    assert f"{file} has dp = 2, tensor_split = '2,1', sequence_parallel = True, which" in said[0]
    kept = load_settings(file, {"dp": 4, "tp": 2, "tensor_split": "3,1"}, said.append)
    assert (kept.tp, kept.dp, kept.tensor_split) == (2, 4, "3,1")
    # Without a size the layout is the file's.
    assert load_settings(file, {"steps": 7, "tensor_split": "3,1"}, said.append).ranks == 4
    file.write_text(to_toml(settings_for(inputs, "run")))
    assert load_settings(file, {"pp": 2}, said.append).ranks == 2
    assert len(said) == 2


def disagree(world: Any, what: Callable[[int], dict[str, object]]) -> None:
    from colrow.train.faults import check_agreement
    from tests.train.layouts import Layout, make_mesh

    check_agreement(what(world.rank), make_mesh(world, Layout(tp=world.size)))


def third_differs(rank: int) -> dict[str, object]:
    return {"seed": 0, "training data": "a" if rank != 2 else "b"}


def test_ranks_that_disagree_are_named(ranks: Any) -> None:
    from tests.ranks import RankError

    message = r"disagree on training data: rank 0 has 'a', rank 2 has 'b'"
    with pytest.raises(RankError, match=message):
        ranks(3, disagree, third_differs)


def test_a_dry_run_shows_what_a_run_would_be(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import colrow

    common = ["train", "--model", str(inputs / "config.json"), "--data", str(inputs / "topics.txt")]
    common += ["--output", str(inputs / "run"), "--tokenizer", "bytes", "--sequence", "33"]
    file = inputs / "dry.json"
    assert main([*common, "--tp", "2", "--dry-run", "--json", str(file)]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "tp rank 1: 1 query heads, 1 KV heads, 50 FFN features, 128 vocabulary rows" in shown
    model = colrow.from_config(inputs / "config.json")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["calls"]["all_reduce"][0] > 0
    assert not (inputs / "run" / "checkpoints").exists()
    order_text = (inputs / "topics.txt").read_text()
    beginning = re.search(r"the first sequence begins: '(.{12})", shown)
    assert beginning is not None
    assert beginning[1].split("\\n")[0] in order_text
