"""The GPU benchmark's program, in tiny and on a CPU: what it measures is not tested."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import timing
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.plain import PlainBlock
from benchmarks.gpu.shapes import shares

SAMPLES = 2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target = tmp_path_factory.mktemp("gpu") / "found.json"
    small = ["--device", "cpu", "--small", "--no-compile", "--dtype", "fp32"]
    assert main([*small, "--turns", str(SAMPLES), "--json", str(target)]) == 0
    assert "A block of llama-3-70b" in target.with_suffix(".md").read_text()
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def test_every_contestant_is_compared_and_timed(report: dict[str, Any]) -> None:
    assert [len(report[part]) for part in ("blocks", "loss", "decoding")] == [3, 1, 4]
    for block in report["blocks"]:
        assert block["relative_difference"] < 1e-6
        assert block["contestants"].keys() == {"colrow", "plain"}
    assert len(report["loss"][0]["contestants"]) == 4
    for part, phases in (
        ("blocks", ("forward", "backward")),
        ("loss", ("forward", "backward")),
        ("decoding", ("token",)),
    ):
        for one in report[part]:
            for contestant in one["contestants"].values():
                assert contestant["problem"] == ""
                for phase in phases:
                    assert len(contestant[phase]["seconds"]) == SAMPLES
    assert report["command"].startswith("python -m benchmarks.gpu --device cpu")
    assert not torch.distributed.is_initialized()


def test_flops_are_those_that_torch_counts() -> None:
    for share in shares(small=True):
        block = PlainBlock(share, torch.device("meta"), torch.float32)
        x = torch.empty(share.batch, share.sequence, share.config.hidden_size, device="meta")
        with FlopCounterMode(display=False) as counter:
            block(x)
        heads = share.heads.query.size(0)
        unseen = 4 * share.tokens * heads * share.attention.head_dim * share.sequence / 2
        assert share.block_flops == counter.get_total_flops() - unseen


def test_a_contestant_that_fails_is_left_out_with_the_reason() -> None:
    def fails() -> None:
        raise RuntimeError("no room\nat all")

    contestants = {"good": {"a": lambda: None}, "bad": {"a": lambda: None, "b": fails}}
    found = timing.Timer(torch.device("cpu"), 3).race(contestants)
    assert len(found["good"].seconds["a"]) == 3 and not found["good"].problem
    assert found["bad"].problem == "RuntimeError: no room" and not found["bad"].seconds


def test_a_cpus_times_do_not_become_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 2
    assert "--json" in capsys.readouterr().out
