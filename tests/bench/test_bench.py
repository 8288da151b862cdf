"""Measuring: what is counted is what the layers do, and parts add up; no test looks at a time."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile, record_function

from colrow.bench.attribution import PREFIX, attribute
from colrow.bench.measure import measure
from colrow.bench.plot import plot
from colrow.bench.result import BenchSettings, Measurement, PhaseTime, speedups
from colrow.cli import main
from colrow.comm.engine import Engine
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from colrow.comm.mesh import Mesh
from colrow.comm.primitives import all_reduce_async
from colrow.planner.catalog import shape_of_sizes
from tests.ranks import RankPool

CONFIG = shape_of_sizes(
    "small", "llama", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=64
).config
SETTINGS = BenchSettings(CONFIG, "block", batch=2, sequence=8, runs=2, warmup=1)


def measured(tp: ParallelGroup, settings: BenchSettings) -> list[Measurement] | None:
    alone = ParallelGroup.single
    engine = Engine("gloo", "the pool's")
    mesh = Mesh(tp, alone("dp"), alone("pp"), None, torch.device("cpu"), engine)
    return measure(settings, mesh, lambda _: None)


def calls(measurement: Measurement) -> dict[str, dict[str, float]]:
    """By phase, without what was not called; every rank must agree."""
    by_rank = [
        {p.phase: {k: n for k, n in p.calls.items() if n} for p in r} for r in measurement.ranks
    ]
    assert all(found == by_rank[0] for found in by_rank)
    return by_rank[0]


def test_a_matmul_inside_attention_is_attention() -> None:
    """Grouped-query attention with a mask in fp64 runs as matmuls; they are not counted twice."""
    q, k = torch.randn(1, 4, 8, 16).double(), torch.randn(1, 4, 8, 16).double()
    weight = torch.randn(16, 16).double()
    with profile() as trace:
        with record_function(f"{PREFIX}one"):
            F.scaled_dot_product_attention(q, k, k, torch.zeros(8, 8).double())
        q @ weight  # in no phase
        with record_function(f"{PREFIX}two"):
            F.linear(q[0, 0], weight).exp()
    found = attribute(trace.function_events or (), cuda=False)
    assert found["one"].calls == {"matmul": 0, "attention": 1}
    assert found["two"].calls == {"matmul": 1, "attention": 0}
    assert found["one"].seconds["matmul"] == 0 < found["one"].seconds["attention"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_block_does_what_the_papers_say(ranks: RankPool, sequence_parallel: bool) -> None:
    """4 matmuls forward, 8 backward, one attention each; the collectives of Megatron's block."""
    settings = replace(SETTINGS, sequence_parallel=sequence_parallel)
    (block,) = ranks(2, measured, settings)[0]
    sent = {"all_gather": 2, "reduce_scatter": 2} if sequence_parallel else {"all_reduce": 2}
    found = calls(block)
    assert found["forward"] == {"matmul": 4, "attention": 1, **sent}
    # The norms' gradients are summed too when each rank has a part of the sequence.
    extra = {"all_reduce": 1} if sequence_parallel else {}
    assert found["backward"] == {"matmul": 8, "attention": 1, **sent, **extra}
    assert (block.subject, block.tp, block.engine, block.tokens) == ("block", 2, "gloo", 16)


@pytest.mark.parametrize("what", ["layer", "attention", "mlp"])
@pytest.mark.parametrize("decode", [False, True])
def test_every_part_alone(what: str, decode: bool) -> None:
    found = measured(ParallelGroup.single(), replace(SETTINGS, what=what, decode=decode))
    assert found is not None
    attention = {"attention": 1}
    expected = {
        "attention.qkv": {"matmul": 1},
        "attention.output": {"matmul": 1},
        "mlp.up": {"matmul": 1},
        "mlp.down": {"matmul": 1},
        "attention": {"matmul": 2, **attention},
        "mlp": {"matmul": 2},
    }
    names = ["attention.qkv", "attention.output", "mlp.up", "mlp.down"]
    assert [m.subject for m in found] == (names if what == "layer" else [what])
    for measurement in found:
        phases = calls(measurement)
        assert phases["token" if decode else "forward"] == expected[measurement.subject]
        assert list(phases) == (["token"] if decode else ["forward", "backward"])


def test_parts_and_rest_are_the_total(ranks: RankPool) -> None:
    (model,) = ranks(2, measured, replace(SETTINGS, what="model"))[0]
    assert [p.phase for p in model.slowest] == ["forward", "backward", "optimizer"]
    # 4 linear layers a block and the head.
    assert calls(model)["forward"]["matmul"] == 9
    assert calls(model)["backward"]["matmul"] == 18
    for phases in model.ranks:
        for p in phases:
            assert p.matmul + p.attention + p.exposed + p.rest == pytest.approx(p.seconds)
            assert len(p.runs) == 2 and min(p.runs) <= p.seconds <= max(p.runs)
            assert p.hidden >= 0 and (p.matmul > 0) == (p.phase != "optimizer")
    assert model.tokens_per_second == pytest.approx(16 / model.seconds)


def test_generation_is_counted_by_token(ranks: RankPool) -> None:
    (model,) = ranks(2, measured, replace(SETTINGS, what="model", decode=True))[0]
    found = calls(model)
    assert found["token"]["matmul"] == 9 and found["token"]["attention"] == 2
    assert found["prompt"]["matmul"] == 9
    # Two reductions a block and the embedding's; the choice of the token gathers.
    assert found["token"]["all_reduce"] == 5 and found["token"]["all_gather"] == 1
    assert model.tokens == 2 and model.seconds == model.slowest[1].seconds


class SlowToStart:
    """A collective whose engine does everything in the call that starts it."""

    def wait(self) -> None:
        """Nothing is left to do."""


def test_work_done_while_starting_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> SlowToStart:
        time.sleep(0.02)
        return SlowToStart()

    monkeypatch.setattr("colrow.comm.primitives.dist.all_reduce", slow)
    tp = ParallelGroup.single()
    tp.size, tp.group = 2, object()  # type: ignore[assignment]
    with record(tp) as ledger:
        pending = all_reduce_async(torch.zeros(4), tp)
        time.sleep(0.02)
        pending.wait()
    assert 0.02 <= ledger.seconds(exposed=True) <= ledger.seconds() - 0.02


def timed(tp: int, seconds: float, subject: str = "mlp") -> Measurement:
    phase = PhaseTime("forward", seconds, 0.5 * seconds, 0, 0, 0, {}, [seconds], seconds)
    slow = replace(phase, seconds=2 * seconds)
    return Measurement(subject, tp, 1, None, "cpu", 10, [[phase], [slow]])


def test_speed_is_that_of_the_slowest_rank() -> None:
    found = [timed(1, 1.0), timed(2, 0.25), timed(2, 1.0, "block")]
    assert [m.seconds for m in found] == [2.0, 0.5, 2.0]
    assert speedups(found) == {("mlp", 1): 1.0, ("mlp", 2): 4.0}


def test_a_picture(tmp_path: Path) -> None:
    plot([timed(1, 1.0), timed(1, 2.0, "block"), timed(2, 0.3)], str(tmp_path / "bench.svg"))
    text = (tmp_path / "bench.svg").read_text()
    assert "<svg" in text


def test_the_command(tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--what", "mlp", "--tp", "1,2", "--sequence", "9", "--runs", "2"]
    assert main(["bench", str(tiny_models / "qwen2"), *arguments, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [m["tp"] for m in report["measurements"]] == [1, 2]
    assert [len(m["ranks"]) for m in report["measurements"]] == [1, 2]
    assert report["measurements"][0]["speedup_over_one_process"] == 1.0
    text = capsys.readouterr().out
    assert "mlp, tp=2 (" in text and "times as fast as one process" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt3-17b"], "unknown model 'gpt3-17b'"),
        ([], "missing --hidden, --layers, --heads, --vocab"),
        (["gpt3-175b", "--hidden", "8"], "--hidden describe a model, and gpt3-175b is one too"),
        (["gpt3-175b", "--tp", "97"], "96 query heads cannot be split over 97 ranks"),
        (["gpt3-175b", "--tp", "2,2"], "'2,2' names a size twice"),
        (["gpt3-175b", "--sequence", "1"], "sequence=1: at least 2 is needed"),
        (["gpt3-175b", "--decode", "--sequence-parallel"], "decoding has one token at a time"),
        (["gpt3-175b", "--plot", "/nowhere/x.png"], "there is no directory for /nowhere/x.png"),
        (["gpt3-175b", "--plot", "x.foo"], "x.foo: the name should end in .png, .svg or .pdf"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
