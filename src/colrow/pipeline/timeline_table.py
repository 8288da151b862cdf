"""A step of a pipeline in the terminal: a line of letters a rank, and where its time went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colrow.pipeline.schedules import Kind
from colrow.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from rich.console import Console

LETTERS: dict[Kind, str] = {"forward": "F", "backward": "B", "input": "I", "weight": "W"}
COLORS: dict[str, str] = {"F": "blue", "B": "green", "I": "cyan", "W": "yellow", "~": "red"}
_MARGIN = len("rank 00  ")


def draw(timeline: Timeline, width: int, seconds: float | None = None) -> list[str]:
    """A line for each rank; a column shows what took most of its time.

    F forward, B backward, I and W the gradients of input and weights, small letters for every
    other microbatch; ~ communication, "." idle.

    Args:
        width: columns.
        seconds: that they stand for; by default the step's.
    """
    column = (seconds or timeline.seconds) / width
    return [_line(timeline, rank, width, column) for rank in range(len(timeline.ranks))]


def _line(timeline: Timeline, rank: int, width: int, column: float) -> str:
    shares: list[dict[str, float]] = [{} for _ in range(width)]

    def fill(start: float, end: float, letter: str) -> None:
        start, end = start - timeline.start, end - timeline.start
        for index in range(int(start / column), width):
            left = max(start, index * column)
            right = min(end, (index + 1) * column)
            if left >= right:
                break
            shares[index][letter] = shares[index].get(letter, 0.0) + right - left

    for span in timeline.ranks[rank]:
        busy = span.end - span.communication
        letter = LETTERS[span.action.kind]
        fill(span.start, busy, letter.lower() if span.action.microbatch % 2 else letter)
        fill(busy, span.end, "~")
    for wait in timeline.waits(rank):
        fill(wait.start, wait.arrived, ".")
        fill(wait.arrived, wait.end, "~")
    return "".join(max(found, key=found.__getitem__) if found else " " for found in shares)


def show(console: Console, timeline: Timeline) -> None:
    """Prints the step as it ran, the same step without messages, and where the time went."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    ideal = timeline.ideal()
    width = max(20, console.width - _MARGIN)
    longest = max(timeline.seconds, ideal.seconds)
    for title, what in (
        ("as it ran", timeline),
        ("with median times, if messages took none", ideal),
    ):
        console.print(
            f"{title}: {1e3 * what.seconds:.2f} ms, bubble {what.bubble_fraction:.1%}",
            highlight=False,
        )
        for rank, line in enumerate(draw(what, width, longest)):
            text = Text(f"rank {rank:<2}  ")
            for letter in line.rstrip():
                text.append(letter, style=COLORS.get(letter.upper(), "dim"))
            console.print(text, soft_wrap=True)
    console.print(
        "F forward, B backward, I gradient of the input, W of the weights (small: every other "
        "microbatch), ~ waiting for communication, . idle"
    )
    table = Table(
        title="Milliseconds of a step", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    kinds: list[Kind] = [kind for kind in LETTERS if any(_has(timeline, kind))]
    for name in ("rank", "stages", *kinds, "communication", "idle", "in flight"):
        table.add_column(name, justify="right", min_width=len(name))
    for rank, spans in enumerate(timeline.ranks):
        found = timeline.time(rank)
        parts = [*(getattr(found, kind) for kind in kinds), found.communication, found.idle]
        table.add_row(
            str(rank),
            ", ".join(map(str, sorted({span.action.stage for span in spans}))),
            *(f"{1e3 * seconds:.2f}" for seconds in parts),
            str(found.microbatches_in_flight),
        )
    console.print(table)
    console.print("in flight: microbatches whose activations a rank keeps, of each of its stages")


def _has(timeline: Timeline, kind: Kind) -> list[bool]:
    return [span.action.kind == kind for spans in timeline.ranks for span in spans]
