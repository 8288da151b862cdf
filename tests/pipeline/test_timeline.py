"""What a step did, recorded on stages that take a known time."""

from __future__ import annotations

import pytest
import torch

from colrow.mesh import ParallelGroup
from colrow.pipeline.record import record_step
from colrow.pipeline.schedules import Schedule, expected_bubble_fraction
from colrow.pipeline.timeline import Timeline
from tests.pipeline.sleeping import run_step, sleeping_pipeline
from tests.ranks import RankPool

MICROBATCHES, PART = 8, 0.01


def recorded(
    pp: ParallelGroup, name: Schedule, chunks: int, parts: tuple[float, ...], steps: int
) -> list[Timeline]:
    schedule, stages = sleeping_pipeline(pp, name, MICROBATCHES, chunks, parts)
    run_step(schedule, stages, MICROBATCHES)
    found = []
    for _ in range(steps):
        with record_step(schedule, stages, device=torch.device("cpu")) as recording:
            run_step(schedule, stages, MICROBATCHES)
        found.append(recording.gather(pp))
    return found


@pytest.mark.parametrize(
    ("name", "chunks"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zbv", 2)],
)
def test_the_bubble_is_the_schedules(ranks: RankPool, name: Schedule, chunks: int) -> None:
    found = ranks(4, recorded, name, chunks, (PART, PART, PART), 3)[0]
    expected = expected_bubble_fraction(name, 4, MICROBATCHES, chunks=chunks)
    best = min(found, key=lambda timeline: timeline.seconds)
    print(name, expected, [t.bubble_fraction for t in found], best.ideal().bubble_fraction)
    assert best.bubble_fraction == pytest.approx(expected, abs=0.03)
    assert best.ideal().bubble_fraction == pytest.approx(expected, abs=0.03)
