"""Drawings of who holds what, as SVG text: matrices cut by columns or rows, heads, collectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from colrow.layers.describe import ColumnSpec, EmbeddingSpec, NormSpec, Part, RowSpec, TableSpec
from colrow.layers.describe.parts import RouterSpec, unknown
from colrow.partition import Partition, Range, ShardSpec
from colrow.planner.charts import COLORS

WIDTH = 900
_LEFT, _MATRIX, _HEIGHT = 190, 260, 62
_HEAD, _IN_A_ROW = 22, 32


def colour(rank: int) -> str:
    """Of a rank; more ranks than colours begin again."""
    return COLORS[rank % len(COLORS)]


def rectangle(x: float, y: float, width: float, height: float, rank: int | None, tip: str) -> str:
    """A piece that one rank holds, or all of them (None)."""
    mark = 'class="all"' if rank is None else f'data-rank="{rank}" fill="{colour(rank)}"'
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.3):.2f}" height="{height:.2f}" '
        f"{mark}><title>{escape(tip)}</title></rect>"
    )


def label(x: float, y: float, text: str, *, anchor: str = "start", style: str = "") -> str:
    """Text; ``style`` is a class of the page."""
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def svg(height: float, parts: Sequence[str]) -> str:
    """A drawing of the page's width."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def legend(ranks: int) -> str:
    """The ranks' colours, which the page's script makes buttons of."""
    return "".join(
        f'<button data-rank="{rank}"><i style="background:{colour(rank)}"></i>rank {rank}</button>'
        for rank in range(ranks)
    )


def strip(partition: Partition, x: float, y: float, width: float, height: float, what: str) -> str:
    """A dimension from left to right; what several ranks hold lies between them."""
    scale = width / partition.length
    ends = sorted({end for bounds in partition.bounds for end in bounds})
    out = []
    for start, stop in pairwise(ends):
        holders = [r for r, (a, b) in enumerate(partition.bounds) if a <= start and stop <= b]
        share = height / len(holders)
        for lane, rank in enumerate(holders):
            others = f", as {len(holders)} ranks do" if len(holders) > 1 else ""
            tip = f"rank {rank}: {what} {span((start, stop))} of {partition.length}{others}"
            long = (stop - start) * scale - 0.6
            out.append(rectangle(x + start * scale, y + lane * share, long, share, rank, tip))
    return "".join(out)


def span(bounds: Range) -> str:
    """ "0 to 4", both included."""
    start, stop = bounds
    return f"{start}" if stop - start == 1 else f"{start} to {stop - 1}" if stop > start else "none"


def part_row(name: str, part: Part, y: float, ranks: int) -> tuple[str, float]:
    """One layer of a block: its weight as it is cut, its name, its shapes. Also its height."""
    (shard, cut) = _cut(part)
    height = 20.0 if len(shard.shape) == 1 else float(_HEIGHT)
    out = [label(_LEFT - 14, y + height / 2 + 4, name, anchor="end", style="name")]
    if shard.dim is None:
        out.append(rectangle(_LEFT, y, _MATRIX, height, None, f"{name}: the same on every rank"))
    elif cut == "rows":
        (rows,) = shard.blocks
        for rank, (start, stop) in enumerate(rows.bounds):
            top, share = height * start / rows.length, height * (stop - start) / rows.length
            tip = f"rank {rank}: input features {span((start, stop))} of {rows.length}"
            out.append(rectangle(_LEFT, y + top, _MATRIX, share - 0.6, rank, tip))
    else:
        total, x = sum(block.length for block in shard.blocks), float(_LEFT)
        for block in shard.blocks:
            width = _MATRIX * block.length / total
            out.append(strip(block, x, y, width - 1.5, height, "output features"))
            x += width
    whole = " × ".join(map(str, shard.shape))
    local = sorted({shard.local_shape(rank) for rank in range(ranks)}, reverse=True)
    here = " or ".join(" × ".join(map(str, shape)) for shape in local)
    x = _LEFT + _MATRIX + 18
    out.append(label(x, y + height / 2 - (3 if height > 20 else -4), f"{whole}, {cut}"))
    if height > 20:
        out.append(label(x, y + height / 2 + 13, f"a rank: {here}", style="small"))
    return "".join(out), height


def _cut(part: Part) -> tuple[ShardSpec, str]:
    """The weight, and in words how it is cut."""
    shard = part.parameters()["weight"].shard
    if isinstance(part, ColumnSpec):
        fused = f", {len(part.blocks)} side by side" if len(part.blocks) > 1 else ""
        return shard, f"columns{fused}"
    if isinstance(part, RowSpec):
        return shard, "rows"
    if isinstance(part, EmbeddingSpec):
        return shard, "vocabulary rows"
    if isinstance(part, NormSpec | TableSpec | RouterSpec):
        return shard, "whole" if shard.dim is None else "features"
    unknown(part, "the page of an explanation")


def arrow(y: float, text: str, sent: str) -> tuple[str, float]:
    """Something that happens between the layers: a collective, or nothing. Also its height."""
    style = "sent" if sent else "quiet"
    box = f'<rect x="{_LEFT}" y="{y:.1f}" width="{_MATRIX}" height="20" rx="10" class="{style}"/>'
    middle = _LEFT + _MATRIX / 2
    out = [box, label(middle, y + 14, text, anchor="middle", style=f"on-{style}")]
    if sent:
        out.append(label(_LEFT + _MATRIX + 18, y + 14, sent, style="small"))
    return "".join(out), 20.0


def heads(partition: Partition, shared: Partition) -> str:
    """Query heads as squares over the KV heads that they read."""
    group = partition.length // shared.length
    per_row = max(1, _IN_A_ROW // group) * group
    out, rows = [], math.ceil(partition.length / per_row)
    for head in range(partition.length):
        owner = next(r for r, (a, b) in enumerate(partition.bounds) if a <= head < b)
        x, y = _place(head, per_row)
        tip = f"rank {owner}: query head {head}, which reads KV head {head // group}"
        out.append(rectangle(x, y, _HEAD - 2, _HEAD - 2, owner, tip))
        out.append(label(x + _HEAD / 2 - 1, y + 14, str(head), anchor="middle", style="on"))
    for head in range(shared.length):
        holders = [r for r, (a, b) in enumerate(shared.bounds) if a <= head < b]
        x, y = _place(head * group, per_row)
        width = (group * _HEAD - 2) / len(holders)
        for place, rank in enumerate(holders):
            others = f", which {len(holders)} ranks hold" if len(holders) > 1 else ""
            tip = f"rank {rank}: KV head {head}{others}"
            out.append(rectangle(x + place * width, y + _HEAD, width - 0.6, 9, rank, tip))
    return svg(rows * (_HEAD + 20) + 4, out)


def _place(head: int, per_row: int) -> tuple[float, float]:
    row, column = divmod(head, per_row)
    return 4 + column * _HEAD, 2 + row * (_HEAD + 20)
