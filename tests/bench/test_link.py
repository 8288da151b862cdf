from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from colrow.bench import machine
from colrow.bench.link import OPERATIONS, Curve, measure_links, message_sizes
from colrow.bench.link_result import Links, merged_machine
from colrow.bench.link_table import show_links
from colrow.cli import main
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.planner import load_machine
from tests.layers.dense import raises
from tests.ranks import RankPool

SIZES = (1200, 120_000)


def mesh_of(tp: ParallelGroup) -> Mesh:
    alone = ParallelGroup.single
    return Mesh(tp, alone("dp"), alone("pp"), None, torch.device("cpu"))


def measure(tp: ParallelGroup) -> tuple[list[Curve], list[str]]:
    told: list[str] = []
    curves = measure_links(
        mesh_of(tp), message_bytes=SIZES, seconds_each=0.01, progress=told.append
    )
    return curves, told


@pytest.mark.parametrize("n", [2, 3])
def test_every_operation_has_a_curve(ranks: RankPool, n: int) -> None:
    results = ranks(n, measure)
    curves, told = results[0]
    assert all(other[0] == curves for other in results)  # the slowest rank's, on every rank
    assert [curve.op for curve in curves] == list(OPERATIONS)
    assert told[0] == f"measuring all-reduce between {n} ranks" and len(told) == len(OPERATIONS)
    for curve in curves:
        assert (curve.ranks, curve.message_bytes) == (n, SIZES)
        for seconds, rounds in zip(curve.seconds, curve.rounds, strict=True):
            assert len(rounds) == 7 and sorted(rounds)[3] == seconds > 0


def line(op: str, ranks: int, latency: float, bytes_per_second: float) -> Curve:
    sizes = (1000, 120_000, 1_000_000)
    seconds = tuple(latency + size / bytes_per_second for size in sizes)
    return Curve(op, ranks, sizes, seconds, tuple((s,) for s in seconds))


def measure_machine(tp: ParallelGroup) -> dict[str, object]:
    curves = [line(op, tp.size, 5e-6, 2e9) for op in OPERATIONS]
    matmuls, machine._MATMULS = machine._MATMULS, ((32, 16, 8), (64, 64, 64))
    try:
        return machine.machine_file(mesh_of(tp), curves, seconds_each=0.01)
    finally:
        machine._MATMULS = matmuls


def test_the_planner_reads_what_was_measured(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks(2, measure_machine)
    assert first == second
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(first))
    hardware = load_machine(file)
    assert hardware.devices_per_node == 2
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        assert hardware.link.collective_seconds(op, 120_000, 2) == pytest.approx(5e-6 + 6e-5)
    assert {"fp32", "bf16"} == {name for name, _ in hardware.device.peak_flops}
    assert [flops for flops, _ in hardware.device.matmul_curve] == [2 * 32 * 16 * 8, 2 * 64**3]


def test_the_table_fits_a_terminal() -> None:
    text = StringIO()
    curves = [line(op, 3, 0.5 if op == "send" else 5e-6, 2e9) for op in OPERATIONS]
    show_links(Console(file=text, width=80), curves, "gloo (a test)")
    lines = text.getvalue().splitlines()
    assert "between 3 ranks, engine gloo (a test)" in lines[0].lower()
    assert "…" not in text.getvalue() and max(map(len, lines)) <= 80
    assert all(name in text.getvalue() for name in ("117 KiB", "reduce-scatter", "500ms"))


def test_a_line_is_fitted_to_the_buffers_bytes() -> None:
    for op in OPERATIONS:
        curve = line(op, 4, 5e-6, 2e9)
        assert curve.fit() == pytest.approx((5e-6, 2e9))
        assert curve.bytes_per_second(2) == pytest.approx(1e6 / curve.seconds[2])
        assert curve.as_dict()["bytes_per_second"] == pytest.approx(2e9)
    falling = dataclasses.replace(curve, seconds=curve.seconds[::-1])
    assert falling.fit() is None and "bytes_per_second" not in falling.as_dict()


def refuse(tp: ParallelGroup) -> None:
    mesh = mesh_of(tp)
    with raises(ValueError, "two ends"):
        measure_links(mesh_of(ParallelGroup.single()))
    with raises(ValueError, "1000 bytes", "multiple of 12"):
        measure_links(mesh, message_bytes=(1000,))
    with raises(ValueError, "'gossip'", "all_reduce, all_gather"):
        measure_links(mesh, operations=("gossip",))


def test_what_cannot_be_measured_is_refused(ranks: RankPool) -> None:
    ranks(3, refuse)
    assert message_sizes(3, 1024, 5000) == (1032, 4104)


def measure_a_wrong_engine(tp: ParallelGroup) -> None:
    right = primitives.all_reduce
    primitives.all_reduce = lambda x, *args, **options: x  # type: ignore[assignment]
    try:
        with raises(RuntimeError, "all_reduce of 30 numbers did not give 2"):
            measure_links(mesh_of(tp), message_bytes=(120,), operations=("all_reduce",))
    finally:
        primitives.all_reduce = right


def test_a_wrong_engine_is_not_timed(ranks: RankPool) -> None:
    ranks(2, measure_a_wrong_engine)


def test_a_machine_file_has_the_links_of_every_size_or_is_not_written() -> None:
    def links(ranks: int, seconds: float) -> Links:
        curve = line("all_reduce", ranks, 5e-6, 2e9)
        curve = dataclasses.replace(curve, seconds=(*curve.seconds[:2], seconds))
        table = {"memory_gigabytes": 4, "memory_gigabytes_per_second": 10}
        link = {k: v for k, v in curve.as_dict().items() if k in ("op", "ranks")}
        link |= {"message_bytes": list(curve.message_bytes), "seconds": list(curve.seconds)}
        device = {**table, "peak_teraflops": {"fp32": ranks}}
        machine = {"name": "m", "devices_per_node": ranks, "device": device, "link": [link]}
        return Links("gloo (a test)", "cpu", [curve], machine)

    merged = merged_machine([links(2, 5e-4), links(4, 6e-4), links(3, 7e-4)])
    assert [entry["ranks"] for entry in merged["link"]] == [2, 4, 3]  # type: ignore[attr-defined]
    assert merged["device"]["peak_teraflops"] == {"fp32": 4}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"no machine file was written: .* do not grow"):
        merged_machine([links(2, 1e-9)])


def test_the_command_writes_curves(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--link", "--tp", "1,2", "--engine", "gloo", "--device", "cpu"]
    assert main([*command, "--seconds", "0.001", "--json", "-"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["engine"] == "gloo (as asked for)" and found["device"] == "cpu"
    assert [curve["op"] for curve in found["curves"]] == list(OPERATIONS)
    assert found["curves"][0]["message_bytes"] == [4**power for power in range(5, 13)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--link", "gpt3-175b", "--decode"], "runs no model: leave out MODEL, --decode"),
        (["--link", "--tp", "1"], "two ends: use --tp 2 or more"),
        (["--link", "--machine", "m.toml"], "m.toml: the file's name must end in .json"),
        (["--link", "--seconds", "0"], "--seconds 0: must be positive"),
        (["gpt3-175b", "--machine", "m.json"], "describes what --link measures: give both"),
    ],
)
def test_what_link_would_ignore_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
