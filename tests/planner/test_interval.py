"""How far predictions can be off."""

from __future__ import annotations

from dataclasses import replace

from colrow.planner import Layout, predict

BASE = Layout(tp=8, pp=2, dp=4, global_batch=128, sequence=4096, sequence_parallel=True, zero=1)


def test_the_interval_is_wider_where_more_is_sent() -> None:
    def width(layout: Layout, gpu: str = "a100") -> float:
        p = predict("llama-3-70b", layout, gpu)
        assert p.interval.low < p.step_seconds < p.interval.high
        assert p.interval.low < p.interval.middle < p.interval.high
        return p.interval.high / p.interval.low

    inside = width(BASE)
    assert width(replace(BASE, tp=16, dp=2)) > inside
    assert width(BASE, "h100-efa") > 1.5 * width(BASE, "h100")


def test_layouts_that_differ_in_little_cannot_be_told_apart() -> None:
    first, second, third = (
        predict("llama-3-70b", layout, "a100")
        for layout in (BASE, replace(BASE, zero=0), replace(BASE, tp=16, dp=2))
    )
    assert first.is_as_fast_as(second) and second.is_as_fast_as(first)
    assert not first.is_as_fast_as(third)
