"""What a step did, recorded on stages that take a known time."""

from __future__ import annotations

import json
import time
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import colrow
from colrow.comm.collectives import reduce_from_tp
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from colrow.pipeline.recording import clock_offset, record_step
from colrow.pipeline.schedules import Action, Schedule, Span, expected_bubble_fraction
from colrow.pipeline.timeline import Timeline, Wait
from colrow.pipeline.timeline_plot import plot
from colrow.pipeline.timeline_table import draw, show
from tests.pipeline.sleeping import loss, run_step, sleeping_pipeline
from tests.pipeline.test_schedules import order_of
from tests.ranks import RankPool

CPU, MICROBATCHES, TRIES = torch.device("cpu"), 8, 3
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zbv", 2)]


def recorded(pp: ParallelGroup, name: Schedule, chunks: int, parts: tuple[float, ...]) -> Timeline:
    """A step after a first one, in which nothing sleeps."""
    schedule, stages = sleeping_pipeline(pp, name, MICROBATCHES, chunks, (0.0, 0.0, 0.0))
    run_step(schedule, stages, MICROBATCHES)
    for stage in stages:
        stage.submod.seconds = parts
    with record_step(schedule, stages, device=CPU) as recording:
        run_step(schedule, stages, MICROBATCHES)
    return recording.gather(pp)


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_every_action_is_recorded_once_in_its_order(
    ranks: RankPool, name: Schedule, chunks: int
) -> None:
    found = ranks(4, recorded, name, chunks, (0.0, 0.0, 0.0))[0]
    order = [[span.action for span in spans] for spans in found.ranks]
    assert order == order_of(name, 4, MICROBATCHES, chunks)
    for spans in found.ranks:
        assert all(0 <= span.start <= span.end for span in spans)
        for before, after in pairwise(spans):
            assert before.end <= after.start
    for rank in range(4):
        parts = found.time(rank)
        total = parts.forward + parts.backward + parts.input + parts.weight
        assert total + parts.communication + parts.idle == pytest.approx(found.seconds)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_the_bubble_is_the_schedules(ranks: RankPool, name: Schedule, chunks: int) -> None:
    """Sleeping costs no core, so four ranks do it anywhere. Other work on the machine only ever
    makes a step longer: of several steps the shortest is the least disturbed."""
    expected = expected_bubble_fraction(name, 4, MICROBATCHES, chunks=chunks)
    found: list[Timeline] = []
    for _ in range(TRIES):
        found.append(ranks(4, recorded, name, chunks, (0.1, 0.1, 0.1))[0])
        best = min(found, key=lambda timeline: timeline.seconds)
        if abs(best.bubble_fraction - expected) <= 0.03:
            break
    print(f"{name}: expected {expected:.4f}, measured {best.bubble_fraction:.4f}")
    assert best.bubble_fraction == pytest.approx(expected, abs=0.03)
    assert best.ideal().bubble_fraction == pytest.approx(expected, abs=0.01)


class _Late(nn.Module):
    """Sums over tp, which the last tp rank comes to late."""

    def __init__(self, tp: ParallelGroup) -> None:
        super().__init__()
        self.tp, self.weight = tp, nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.rank == 1:
            time.sleep(0.02)
        return reduce_from_tp(x * self.weight, self.tp)


def with_collectives(world: ParallelGroup) -> tuple[Timeline, int]:
    mesh = colrow.init_mesh(tp=2, pp=2, device="cpu")
    example = torch.ones(1, 2)
    stage = PipelineStage(
        _Late(mesh.tp),
        mesh.pp.rank,
        2,
        CPU,
        input_args=(example.clone().requires_grad_(mesh.pp.rank > 0),),
        output_args=(example.clone().requires_grad_(),),
        group=mesh.pp.group,
    )
    schedule: Any = ScheduleGPipe(stage, 2, loss_fn=loss)
    run_step(schedule, [stage], 2)
    with record(mesh.tp) as outside:
        with record_step(schedule, [stage], mesh.tp, device=CPU) as recording:
            run_step(schedule, [stage], 2)
        reduce_from_tp(example, mesh.tp)
    assert vars(stage).keys().isdisjoint({"forward_one_chunk", "backward_one_chunk"})
    return recording.gather(mesh.pp), len(outside.calls)


def test_waiting_for_collectives_inside_a_stage_is_communication(ranks: RankPool) -> None:
    found = ranks(4, with_collectives)
    assert [calls for _, calls in found] == [1] * 4  # the recording leaves all as it was
    for timeline, late in ((found[0][0], False), (found[1][0], True)):
        for rank in range(2):
            forward = [s for s in timeline.ranks[rank] if s.action.kind == "forward"]
            backward = [s for s in timeline.ranks[rank] if s.action.kind == "backward"]
            assert len(forward) == len(backward) == 2
            assert all(0 < span.communication < span.seconds for span in forward)
            assert all(span.communication == 0 for span in backward)
            if not late:
                assert timeline.time(rank).communication > 0.02


def offset(pp: ParallelGroup, ahead: list[float]) -> float:
    real, mine = time.perf_counter, ahead[pp.rank]
    time.perf_counter = lambda: real() + mine
    try:
        return clock_offset(pp, CPU)
    finally:
        time.perf_counter = real


def test_clocks_of_other_hosts(ranks: RankPool) -> None:
    found = ranks(3, offset, [5.0, 1000.0, -7.0])
    assert found == pytest.approx([0.0, 995.0, -12.0], abs=0.5)


F0, F1, B0, B1 = (Action(stage, kind, 0) for kind in ("forward", "backward") for stage in (0, 1))
BY_HAND = Timeline(
    (
        (Span(F0, 0.0, 2.0, 0.5), Span(B0, 7.0, 10.0)),
        (Span(F1, 3.0, 4.0), Span(B1, 4.0, 6.0)),
    )
)


def test_waits_are_idle_until_the_message_is_there() -> None:
    assert BY_HAND.waits(0) == [Wait(2.0, 6.0, 7.0)]
    assert BY_HAND.waits(1) == [Wait(0.0, 2.0, 3.0), Wait(6.0, 10.0, 10.0)]
    first, second = BY_HAND.time(0), BY_HAND.time(1)
    assert (first.forward, first.backward, first.communication, first.idle) == (1.5, 3, 1.5, 4)
    assert (second.forward, second.backward, second.communication, second.idle) == (1, 2, 1, 6)
    assert BY_HAND.bubble_fraction == pytest.approx(12 / 20)
    assert BY_HAND.ideal().seconds == 8.0
    assert BY_HAND.ideal().waits(0) == [Wait(2.0, 5.0, 5.0)]


def test_a_picture_in_letters() -> None:
    assert draw(BY_HAND, 20) == ["FFF~........~~BBBBBB", "....~~FFBBBB........"]
    text = StringIO()
    show(Console(file=text, width=80, highlight=False), BY_HAND)
    assert "as it ran: 10000.00 ms, bubble 60.0%" in text.getvalue()
    assert "with median times, if messages took none: 8000.00 ms, bubble 50.0%" in text.getvalue()


def test_a_picture_and_json(tmp_path: Path) -> None:
    plot(BY_HAND, str(tmp_path / "step.svg"), title="1f1b")
    assert "<svg" in (tmp_path / "step.svg").read_text()
    found = json.loads(json.dumps(BY_HAND.as_dict()))
    assert found["ranks"][1]["idle"] == 6.0
    assert found["ranks"][0]["actions"][1] == {
        "stage": 0,
        "kind": "backward",
        "microbatch": 0,
        "start": 7.0,
        "end": 10.0,
        "communication": 0.0,
    }
