"""``colrow bench --pp``: what is counted is what the schedule does; no test looks at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import colrow
from colrow.bench.pipeline_result import PipelineMeasurement, PipelineSettings
from colrow.bench.pipeline_run import measure_pipeline
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.pipeline.messages import predict_pipeline_step
from colrow.planner.catalog import decoder
from tests.ranks import RankPool

CONFIG = decoder(
    "small", "llama", hidden=32, layers=4, heads=4, kv_heads=2, ffn=48, vocab=64
).config


def measured(_: ParallelGroup, settings: PipelineSettings) -> PipelineMeasurement | None:
    mesh = colrow.init_mesh(tp=settings.tp, pp=settings.pp, device="cpu")
    return measure_pipeline(settings, mesh, lambda _: None)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_every_action_and_every_message_is_there(ranks: RankPool, schedule: str) -> None:
    settings = PipelineSettings(
        CONFIG,
        2,
        tp=2,
        schedule=schedule,
        microbatches=4,
        tensor_split="3,1" if schedule == "zbv" else "",
        sequence=8,
        runs=3,
        warmup=1,
    )
    found = ranks(4, measured, settings)
    assert found[1:] == [None] * 3
    first = found[0]
    assert len(first.runs) == 3 and first.step.seconds == sorted(first.runs)[1]
    kinds = ("forward", "backward") if schedule == "1f1b" else ("forward", "input", "weight")
    for rank, spans in enumerate(first.step.ranks):
        stages = [stage.index for stage in settings.split.of_rank(rank)]
        expected = {(s, k, m) for s in stages for k in kinds for m in range(4)}
        actions = [(s.action.stage, s.action.kind, s.action.microbatch) for s in spans]
        assert set(actions) == expected and len(actions) == len(expected)
        assert first.step.time(rank).communication > 0  # every stage has collectives of tp
        predicted = predict_pipeline_step(
            CONFIG,
            CONFIG.divide(2, settings.tensor_split),
            settings.split,
            settings.schedule,
            tp_rank=0,
            pp_rank=rank,
            microbatches=4,
            batch=1,
            sequence=8,
        )
        sent = [call.bytes for call in predicted if call.op == "send"]
        assert (first.sent_messages[rank], first.sent_bytes[rank]) == (len(sent), sum(sent))
        assert first.kept_bytes[rank] > 0
    if settings.tensor_split:  # the rank that is measured has the larger shares
        even = ranks(4, measured, replace(settings, tensor_split="", runs=1))[0]
        assert all(a > b for a, b in zip(first.kept_bytes, even.kept_bytes, strict=True))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--hidden", "32", "--layers", "4", "--heads", "4", "--vocab", "64"]
    words += ["--pp", "2", "--schedule", "interleaved", "--microbatches", "4", "--sequence", "8"]
    out, picture = tmp_path / "step.json", tmp_path / "step.svg"
    files = ["--runs", "1", "--json", str(out), "--timeline", str(picture)]
    assert main([*words, *files, "--layer-split", "2,2"]) == 0
    report = json.loads(out.read_text())
    assert report["settings"]["layers"] == [1, 1, 1, 1]
    assert report["expected_bubble_fraction"] == 1 / 9
    assert [len(rank["actions"]) for rank in report["step"]["ranks"]] == [16, 16]
    assert 0 < report["ideal"]["seconds"] <= report["step"]["seconds"]
    assert "<svg" in picture.read_text()
    text = capsys.readouterr().out
    assert "interleaved, pp 2, 4 microbatches of 1 x 8 tokens" in text
    assert "as it ran:" in text and "with median times, if messages took none:" in text
    assert "cost the same: 11.1%" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "zbv"], "--schedule is of a pipeline: give --pp too"),
        (["--timeline", "x.png"], "--timeline is of a pipeline: give --pp too"),
        (["--pp", "2", "--decode"], "--pp measures steps of training: leave --decode out"),
        (["--pp", "2", "--what", "mlp"], "--pp runs the whole model: leave --what mlp out"),
        (["--pp", "2", "--plot", "x.png"], "is --timeline FILE, not --plot"),
        (["--pp", "2", "--tp", "1,2"], "--pp takes one tensor-parallel size, not 2"),
        (["--pp", "2", "--tp", "2", "--tensor-split", "1"], "for a tensor-parallel size of 2"),
        (["--pp", "1"], "pp=1: a pipeline has at least 2 ranks"),
        (["--pp", "4", "--microbatches", "3"], "schedule=1f1b fills its 4 stages with at least"),
        (["--pp", "200"], "need at least as many layers, and the model has 96"),
        (["--pp", "2", "--layer-split", "1,x"], "should be numbers with commas between"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gpt3-175b", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
