"""Closed forms of bubbles against the orders of torch.distributed.pipelining, timed on paper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import (
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from colrow.pipeline.schedules import (
    Action,
    Kind,
    Schedule,
    bubble_fraction,
    expected_bubble_fraction,
    most_in_flight,
    simulate,
)
from colrow.planner.layout import Layout as PlannedLayout
from colrow.planner.pipeline_time import StageSeconds, bubble_seconds

CLASSES = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
TORCH_NAMES: dict[str, Kind] = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "input",
    "BACKWARD_WEIGHT": "weight",
}


def gpipe(ranks: int, microbatches: int) -> list[list[Action]]:
    return [
        [Action(rank, kind, n) for kind in ("forward", "backward") for n in range(microbatches)]
        for rank in range(ranks)
    ]


def one_f_one_b(ranks: int, microbatches: int) -> list[list[Action]]:
    order = []
    for rank in range(ranks):
        warmup = min(ranks - rank, microbatches)
        actions = [Action(rank, "forward", n) for n in range(warmup)]
        for n in range(microbatches):
            actions.append(Action(rank, "backward", n))
            if warmup + n < microbatches:
                actions.append(Action(rank, "forward", warmup + n))
        order.append(actions)
    return order


def torch_order(schedule: str, ranks: int, microbatches: int, chunks: int) -> list[list[Action]]:
    """What torch's schedule plans; it asks a stage for no more than this to plan."""
    stages: list[Any] = [
        SimpleNamespace(
            group_size=ranks,
            group_rank=0,
            num_stages=ranks * chunks,
            stage_index=index,
            submod=None,
            has_backward=True,
        )
        for index in ((0, 2 * ranks - 1) if schedule == "zbv" else range(0, ranks * chunks, ranks))
    ]
    planned = CLASSES[schedule](stages, microbatches, loss_fn=lambda *_: None).pipeline_order
    return [
        [
            Action(a.stage_index, TORCH_NAMES[a.computation_type.name], a.microbatch_index)
            for a in planned[rank]
            if a is not None
        ]
        for rank in range(ranks)
    ]


def order_of(schedule: str, ranks: int, microbatches: int, chunks: int) -> list[list[Action]]:
    if schedule == "gpipe":
        return gpipe(ranks, microbatches)
    if schedule == "1f1b":
        return one_f_one_b(ranks, microbatches)
    return torch_order(schedule, ranks, microbatches, chunks)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16), (3, 9)])
@pytest.mark.parametrize("parts", [(1.0, 1.0, 1.0), (1.0, 1.2, 0.8), (2.0, 3.0, 1.5)])
@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved", 2),
        ("interleaved", 3),
        ("zero-bubble", 1),
        ("zero-bubble", 2),
        ("zbv", 2),
    ],
)
def test_the_closed_form_is_what_the_order_takes(
    schedule: Schedule,
    chunks: int,
    parts: tuple[float, float, float],
    ranks: int,
    microbatches: int,
) -> None:
    if schedule == "zbv":
        parts = (parts[0],) * 3
    forward, input, weight = parts
    cost = {"forward": forward, "input": input, "weight": weight, "backward": input + weight}
    order = order_of(schedule, ranks, microbatches, chunks)
    spans = simulate(order, lambda action: cost[action.kind])
    assert [[span.action for span in rank] for rank in spans] == order
    expected = expected_bubble_fraction(
        schedule, ranks, microbatches, chunks=chunks, forward=forward, input=input, weight=weight
    )
    assert bubble_fraction(spans) == pytest.approx(expected, rel=1e-12)


def test_the_textbook_fractions() -> None:
    assert expected_bubble_fraction("gpipe", 4, 8) == 3 / 11
    assert expected_bubble_fraction("1f1b", 4, 8) == 3 / 11
    assert expected_bubble_fraction("interleaved", 4, 8, chunks=2) == 3 / 19
    assert expected_bubble_fraction("zero-bubble", 4, 8) == 3 / 27
    assert expected_bubble_fraction("zbv", 4, 8, chunks=2) == 3 / 51
    assert expected_bubble_fraction("1f1b", 1, 8) == 0


def test_microbatches_in_flight() -> None:
    for ranks, microbatches in ((4, 8), (4, 4), (3, 2)):
        assert [most_in_flight(a) for a in gpipe(ranks, microbatches)] == [microbatches] * ranks
        expected = [min(ranks - rank, microbatches) for rank in range(ranks)]
        assert [most_in_flight(a) for a in one_f_one_b(ranks, microbatches)] == expected


def test_an_order_that_waits_for_itself() -> None:
    order = [[Action(0, "backward", 0), Action(0, "forward", 0)], [Action(1, "forward", 0)]]
    with pytest.raises(ValueError, match=r"rank 0 waits for ever before .*kind='backward'"):
        simulate(order, lambda _: 1.0)


def test_what_has_no_closed_form() -> None:
    with pytest.raises(ValueError, match="6 microbatches do not fill 4 ranks under 'zbv'"):
        expected_bubble_fraction("zbv", 4, 6, chunks=2)
    with pytest.raises(ValueError, match="'1f1b' has 1 stages a rank, not 2"):
        expected_bubble_fraction("1f1b", 4, 8, chunks=2)
    with pytest.raises(ValueError, match="zbv has a closed form where"):
        expected_bubble_fraction("zbv", 4, 8, chunks=2, weight=0.5)
    with pytest.raises(ValueError, match="one of gpipe, 1f1b"):
        expected_bubble_fraction("dualpipe", 4, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("planned", "schedule", "chunks"),
    [
        ("gpipe", "gpipe", 1),
        ("1f1b", "1f1b", 1),
        ("interleaved", "interleaved", 2),
        ("zb-h1", "zero-bubble", 1),
    ],
)
def test_the_planner_says_the_same(planned: Any, schedule: Schedule, chunks: int) -> None:
    """Of equal stages; the planner also knows unequal ones."""
    ranks, microbatches, forward, input, weight = 4, 8, 1.0, 1.2, 0.8
    layout = PlannedLayout(
        pp=ranks, schedule=planned, virtual_stages=chunks, global_batch=microbatches
    )
    stage = StageSeconds(chunks * forward, chunks * (input + weight), chunks * weight)
    idle = bubble_seconds(layout, [stage] * ranks)
    expected = expected_bubble_fraction(
        schedule, ranks, microbatches, chunks=chunks, forward=forward, input=input, weight=weight
    )
    assert idle / (idle + microbatches * stage.total) == pytest.approx(expected, rel=1e-12)
