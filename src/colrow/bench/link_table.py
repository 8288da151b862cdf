"""Curves of links as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colrow.bench.link import Curve

if TYPE_CHECKING:
    from rich.console import Console


def show_links(console: Console, curves: Sequence[Curve], engine: str) -> None:
    """Prints each operation's time and bandwidth by size, and the line through them.

    Args:
        engine: its name and why it was chosen, for the title.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"Between {curves[0].ranks} ranks, engine {engine}: time, GB/s",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("bytes", justify="right", no_wrap=True)
    for curve in curves:
        table.add_column(curve.op.replace("_", "-"), justify="right", no_wrap=True)
    for index, size in enumerate(curves[0].message_bytes):
        table.add_row(_size(size), *(_cell(curve, index) for curve in curves))
    table.add_section()
    fits = [curve.fit() for curve in curves]
    table.add_row("latency", *("-" if f is None else _time(f[0]) for f in fits))
    table.add_row("bandwidth", *("-" if f is None else f"{f[1] / 1e9:.2f} GB/s" for f in fits))
    console.print(table)
    console.print(
        "Medians on the slowest rank. GB/s = bytes of the whole buffer by time; latency and "
        "bandwidth: the straight line through all sizes, each weighted by its own time."
    )


def _cell(curve: Curve, index: int) -> str:
    return f"{_time(curve.seconds[index])} {curve.bytes_per_second(index) / 1e9:.2f}"


def _time(seconds: float) -> str:
    value, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}{unit}"


def _size(size: int) -> str:
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"
