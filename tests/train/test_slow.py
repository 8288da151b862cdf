"""What takes minutes: whole loss curves, and a run that is killed again and again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.train.loop import train
from tests.ranks import child_ranks, run_world
from tests.train.curves import CASES, curve, reference, settings_for, worst, write_inputs
from tests.train.test_faults import Run, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = 20


@pytest.mark.parametrize(("dtype", "limit"), [("fp64", 1e-9), ("fp32", 1e-4)])
def test_200_steps_are_those_of_one_process_in_every_layout(
    tmp_path: Path, dtype: str, limit: float
) -> None:
    write_inputs(tmp_path)
    expected = reference(settings_for(tmp_path, "-", steps=200, precision=dtype))
    assert expected[-1][0] < 0.6 * expected[0][0]  # it learns
    for case in CASES:
        loss, _ = worst(curve(tmp_path, case, dtype, 200), expected)
        assert loss < limit, case.name


def test_a_run_killed_at_random_moments_ends_bitwise_equal(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    options: dict[str, Any] = {"tp": 2, "steps": 600, "save_every": 3, "keep": 2}
    whole = Run(tmp_path, "whole", **options)
    assert whole.end() == 0
    run, moments = Run(tmp_path, "killed", max_restarts=10 * KILLS, **options), random.Random(0)
    before: set[int] = set()
    for _ in range(KILLS):
        if moments.random() < 0.8:
            run.until("continuing after step|before training")  # in a step, or in a save
            time.sleep(moments.uniform(0, 3))
        else:
            time.sleep(moments.uniform(0, 5))  # while it starts or loads
        while not (ranks := [pid for pid in child_ranks(run.process.pid) if pid not in before]):
            assert run.process.poll() is None, "it ended before it was killed often enough"
            time.sleep(0.05)
        before |= set(ranks)
        run.kill_a_rank(moments.randrange(len(child_ranks(run.process.pid))))
    assert run.end() == 0
    expected, found = weights(whole.output, 600), weights(run.output, 600)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    restarts = [line for line in run.lines if "(restart " in line]
    assert f"(restart {KILLS} of" in restarts[-1]
    assert len(restarts) > KILLS / 2  # most attempts got as far as to take steps

    def losses(of: Run) -> list[float]:
        lines = (of.output / "log.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines[1:])]

    assert losses(run) == losses(whole)


def test_fine_tuning_a_real_model_lowers_held_out_loss_and_exports_it(
    smollm2: Path, tmp_path: Path
) -> None:
    from colrow.cli import main
    from colrow.train.batches import Order
    from colrow.train.data import training_and_held_out
    from tests.any_model.test_export import transformers_loss

    write_inputs(tmp_path)
    settings = settings_for(
        tmp_path,
        "run",
        model=str(smollm2),
        tokenizer="",
        tp=2,
        sequence=128,
        microbatch=1,
        global_batch=4,
        steps=10,
        warmup_steps=2,
        learning_rate=5e-5,
    )
    outcome = run_world(2, train, settings, timeout=1800)[0]
    assert outcome.eval_loss < outcome.initial_eval_loss - 0.1
    assert main(["export", settings.output, str(tmp_path / "hf")]) == 0
    ids, _ = Order(training_and_held_out(settings)[1], 0).batch(0, settings.eval_sequences)
    assert transformers_loss(tmp_path / "hf", ids) == pytest.approx(outcome.eval_loss, rel=1e-5)


@pytest.mark.parametrize("name", ["train_your_own", "finetune_transformers"])
def test_the_training_examples_show_what_they_claim(name: str) -> None:
    script = Path(__file__).parents[2] / "examples" / f"{name}.py"
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(script.read_text().splitlines()) <= 80
