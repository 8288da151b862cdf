"""Small drawings as SVG text: stacked bars, points and rows of boxes, with a tooltip each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = (
    "#3b6ea5",
    "#e08a2e",
    "#4b9b63",
    "#c2504d",
    "#8a6bb0",
    "#8c6a4f",
    "#d17fae",
    "#7f7f7f",
    "#b0b03a",
    "#45a7b5",
    "#1f3b5c",
    "#f2c14e",
    "#9fc5e8",
    "#6b8e23",
    "#e6a4a0",
)


@dataclass(frozen=True)
class BarPart:
    """A coloured stretch of a bar.

    Attributes:
        name: what it is, for legend and tooltip.
        size: in the drawing's unit.
        color: number of a colour.
    """

    name: str
    size: float
    color: int


@dataclass(frozen=True)
class Bar:
    """A labelled bar of parts, one after the other."""

    label: str
    parts: tuple[BarPart, ...]

    @property
    def total(self) -> float:
        """The bar's length."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Point:
    """A point of a scatter drawing; ``marked`` ones are larger."""

    x: float
    y: float
    text: str
    color: int = 0
    marked: bool = False


@dataclass(frozen=True)
class TimeBox:
    """A stretch of a row, such as a forward pass on a device."""

    row: int
    start: float
    end: float
    text: str
    color: int


def bars(rows: Sequence[Bar], unit: str, *, limit: float | None = None, width: int = 860) -> str:
    """Horizontal stacked bars; ``limit`` draws a dashed line, such as a device's memory."""
    left, right, step = 150, 70, 26
    longest = max([row.total for row in rows] + ([limit] if limit else [])) or 1.0
    scale = (width - left - right) / longest
    height = step * len(rows) + 24
    out = []
    for index, row in enumerate(rows):
        y, x = index * step + 4, float(left)
        out.append(_text(left - 8, y + 13, row.label, anchor="end"))
        for part in row.parts:
            if part.size <= 0:
                continue
            length = part.size * scale
            tip = f"{row.label}: {part.name} {part.size:.4g} {unit}"
            out.append(_rect(x, y, length, step - 8, part.color, tip))
            x += length
        out.append(_text(x + 6, y + 13, f"{row.total:.4g}"))
    if limit:
        x = left + limit * scale
        out.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 18}"/>')
        out.append(_text(x, height - 4, f"{limit:.4g} {unit}", anchor="middle"))
    return _svg(width, height, out)


def legend(rows: Sequence[Bar]) -> str:
    """The names of the parts that are not empty, in their colours."""
    names: dict[str, int] = {}
    for row in rows:
        for part in row.parts:
            if part.size > 0:
                names.setdefault(part.name, part.color)
    return "".join(
        f'<span class="key"><i style="background:{_color(color)}"></i>{escape(name)}</span>'
        for name, color in names.items()
    )


def points(
    found: Sequence[Point], x_label: str, y_label: str, *, width: int = 860, height: int = 380
) -> str:
    """Points over two logarithmic axes."""
    left, bottom, top, right = 60, 44, 12, 20
    x_low, x_high = _around([p.x for p in found])
    y_low, y_high = _around([p.y for p in found])

    def at_x(value: float) -> float:
        share = math.log(value / x_low) / math.log(x_high / x_low)
        return left + share * (width - left - right)

    def at_y(value: float) -> float:
        share = math.log(value / y_low) / math.log(y_high / y_low)
        return height - bottom - share * (height - bottom - top)

    out = []
    for value in _ticks(x_low, x_high):
        x = at_x(value)
        out.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
        )
        out.append(_text(x, height - bottom + 16, f"{value:g}", anchor="middle"))
    for value in _ticks(y_low, y_high):
        y = at_y(value)
        out.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(_text(left - 6, y + 4, f"{value:g}", anchor="end"))
    out.append(_text((left + width) / 2, height - 6, x_label, anchor="middle"))
    out.append(
        f'<text transform="translate(14 {height / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for p in sorted(found, key=lambda p: p.marked):
        radius = 6 if p.marked else 3
        out.append(
            f'<circle cx="{at_x(p.x):.1f}" cy="{at_y(p.y):.1f}" r="{radius}" '
            f'fill="{_color(p.color)}" fill-opacity="{1 if p.marked else 0.55}">'
            f"<title>{escape(p.text)}</title></circle>"
        )
    return _svg(width, height, out)


def timeline(
    boxes: Sequence[TimeBox], labels: Sequence[str], end: float, *, width: int = 860
) -> str:
    """Rows of boxes from 0 to ``end`` seconds."""
    left, step = 90, 24
    scale = (width - left - 10) / end
    height = step * len(labels) + 22
    out = [
        _text(left - 8, index * step + 15, label, anchor="end")
        for index, label in enumerate(labels)
    ]
    for box in boxes:
        x = left + box.start * scale
        length = max(0.5, (box.end - box.start) * scale - 0.5)
        out.append(_rect(x, box.row * step + 2, length, step - 4, box.color, box.text))
    out.append(_text(left, height - 4, "0 s"))
    out.append(_text(width - 10, height - 4, f"{end:.4g} s", anchor="end"))
    return _svg(width, height, out)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the range, and never an empty one."""
    return min(values) / 1.15, max(values) * 1.15


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends; fewer of them where the range is wide."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    every = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [value for value in every if low <= value <= high]


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _rect(x: float, y: float, width: float, height: float, color: int, tip: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height}" '
        f'fill="{_color(color)}"><title>{escape(tip)}</title></rect>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
