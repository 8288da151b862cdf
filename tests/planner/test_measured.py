"""Planning with the machine as it was measured here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from colrow.cli import main
from colrow.planner import Layout, predict
from colrow.planner.block_time import block_time
from colrow.planner.catalog import shape_of_sizes
from colrow.planner.measured import measured_hardware

MACHINE: dict[str, object] = {
    "devices_per_node": 2,
    "device": {
        "memory_gigabytes": 8,
        "memory_gigabytes_per_second": 10,
        "peak_teraflops": {"fp32": 0.1},
        "cpu": True,
    },
    "link": {"gigabytes_per_second": 4, "latency_microseconds": 10},
}
MODEL = shape_of_sizes("small", "llama", hidden=64, layers=4, heads=4, vocab=256, positions=128)
BLOCK = Layout(tp=2, global_batch=1, sequence=128, precision="fp32", master_weights=False)


def test_blocks_take_what_they_were_measured_to_take() -> None:
    plain = measured_hardware(MODEL, MACHINE, BLOCK, 1.0)
    block = block_time(MODEL, MODEL.usual_block, BLOCK, plain)
    predicted = block.forward + block.backward
    twice = measured_hardware(MODEL, MACHINE, BLOCK, 2 * predicted)
    once = measured_hardware(MODEL, MACHINE, BLOCK, predicted)
    assert twice.block_factor == pytest.approx(2) and once.block_factor == pytest.approx(1)
    slow, fast = (predict(MODEL, BLOCK, hardware) for hardware in (twice, once))
    for part in ("matmul", "attention", "elementwise", "tp_exposed"):
        assert getattr(slow.time, part) == pytest.approx(2 * getattr(fast.time, part))
    assert slow.time.optimizer == fast.time.optimizer


def test_the_interval_shrinks() -> None:
    single = Layout(sequence=128, precision="fp32")
    measured = measured_hardware(MODEL, MACHINE, BLOCK, 0.01)
    unmeasured = replace(measured, block_factor=None)
    narrow, wide = (
        predict(MODEL, single, hardware).interval for hardware in (measured, unmeasured)
    )
    assert narrow.high / narrow.low < 1.09 < 1.13 < wide.high / wide.low
    assert narrow.middle == pytest.approx(predict(MODEL, single, measured).step_seconds)


@pytest.mark.slow
def test_the_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    sizes = "--hidden 64 --layers 2 --heads 4 --vocab 256 --sequence 64 --tp 2 --precision fp32"
    assert main(["plan", *sizes.split(), "--measure", "--json", str(file)]) == 0
    assert "Measured on 2 ranks" in capsys.readouterr().out
    assert json.loads(file.read_text())["step_seconds"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gpt2 --measure --inference", "leave out --inference"),
        ("gpt2 --measure --machine x.toml", "leave out --machine"),
        ("mixtral-8x7b --measure", "blocks without experts"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *options.split()]) == 2
    assert message in capsys.readouterr().err
