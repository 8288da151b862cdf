"""A step of a pipeline as a picture; needs matplotlib, which the extra ``plots`` installs."""

from __future__ import annotations

from typing import Any

from colrow.pipeline.schedules import Kind
from colrow.pipeline.timeline import Timeline

_COLORS: dict[Kind, str] = {"forward": "C0", "backward": "C2", "input": "C9", "weight": "C8"}
_LABELS: dict[Kind, str] = {
    "forward": "forward",
    "backward": "backward",
    "input": "backward: input",
    "weight": "backward: weights",
}
# What a rank's second and further stages are painted over with.
_PALER = 0.6
# An action gets its microbatch's number where it takes at least this share of the picture.
_WIDE_ENOUGH = 0.012


def plot(timeline: Timeline, path: str, *, title: str = "") -> None:
    """The step as it ran above the same step without messages; a row for each rank."""
    from matplotlib.figure import Figure

    ideal = timeline.ideal()
    figure = Figure(figsize=(11, 2.2 + 0.9 * len(timeline.ranks)), layout="constrained")
    grid = figure.subplots(2, 1, sharex=True)
    longest = max(timeline.seconds, ideal.seconds)
    for axes, what, name in ((grid[0], timeline, "as it ran"), (grid[1], ideal, "no messages")):
        _draw(axes, what, longest)
        axes.set_title(
            f"{name}: {1e3 * what.seconds:.2f} ms, bubble {what.bubble_fraction:.1%}",
            fontsize="small",
            loc="left",
        )
    grid[1].set_xlabel("milliseconds")
    if title:
        figure.suptitle(title, fontsize="medium")
    handles = {label: handle for axes in grid for handle, label in _legend(axes)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize="small"
    )
    figure.savefig(path)


def _draw(axes: Any, timeline: Timeline, longest: float) -> None:
    labelled: set[str] = set()

    def bar(
        rank: int, start: float, seconds: float, color: str, label: str, alpha: float = 1.0
    ) -> None:
        if seconds <= 0:
            return
        fresh = label not in labelled
        labelled.add(label)
        axes.barh(
            rank,
            1e3 * seconds,
            left=1e3 * (start - timeline.start),
            height=0.8,
            color=color,
            alpha=alpha,
            edgecolor="white",
            linewidth=0.4,
            label=label if fresh else None,
        )

    for rank, spans in enumerate(timeline.ranks):
        first = min(span.action.stage for span in spans)
        for span in spans:
            kind, busy = span.action.kind, span.seconds - span.communication
            alpha = 1.0 if span.action.stage == first else _PALER
            bar(rank, span.start, busy, _COLORS[kind], _LABELS[kind], alpha)
            bar(rank, span.start + busy, span.communication, "C3", "communication")
            if span.seconds > _WIDE_ENOUGH * longest:
                middle = (span.start + span.end) / 2 - timeline.start
                text = str(span.action.microbatch)
                axes.text(1e3 * middle, rank, text, ha="center", va="center", fontsize="x-small")
        for wait in timeline.waits(rank):
            bar(rank, wait.start, wait.idle, "0.9", "idle")
            bar(rank, wait.arrived, wait.communication, "C3", "communication")
    axes.set_yticks(range(len(timeline.ranks)), [f"rank {r}" for r in range(len(timeline.ranks))])
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * longest)


def _legend(axes: Any) -> list[tuple[Any, str]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(zip(handles, labels, strict=True))
