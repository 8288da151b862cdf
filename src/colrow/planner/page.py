"""A plan as one page to look at, without anything that must be fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from html import escape
from pathlib import Path

from colrow.pipeline.schedules import Action, simulate
from colrow.planner.charts import Bar, BarPart, Point, TimeBox, bars, legend, points, timeline
from colrow.planner.explain import explain
from colrow.planner.hardware import Hardware
from colrow.planner.memory import RankMemory
from colrow.planner.model import ModelShape
from colrow.planner.orders import pipeline_order
from colrow.planner.predict import Prediction
from colrow.planner.reasons import PART_NAMES, what_loses, why_first
from colrow.planner.recommend import recommend
from colrow.planner.time import stage_schedule

_MEMORY_PARTS = [field.name for field in fields(RankMemory)]
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:920px;padding:0 1rem;
color:#1c2733;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2.2rem}
svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#33424f}
.limit{stroke:#c2504d;stroke-dasharray:5 3;stroke-width:1.5}.grid{stroke:#e3e8ed}
.key{margin-right:1.1em;white-space:nowrap;font-size:13px}
.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25em .9em .25em 0;
border-bottom:1px solid #e3e8ed}td.n,th.n{text-align:right}
pre{background:#f5f7f9;padding:1em;overflow-x:auto;font-size:12.5px}
.big{font-size:1.25rem;font-weight:600}.no{color:#c2504d}
"""


def write_page(
    path: str | Path,
    best: Sequence[Prediction],
    considered: Sequence[Prediction],
    *,
    model: ModelShape,
    hardware: Hardware,
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        best: the layouts to compare, the first being the plan.
        considered: every layout that fits, for the drawing of time against memory.
        model, hardware: what was planned.
    """
    first = best[0]
    title = f"{model.name} on {first.layout.devices} × {hardware.name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _summary(first),
        "<h2>Memory of each pipeline stage's fullest rank</h2>",
        _memory(first),
        "<h2>One step, part by part</h2>",
        _parts(best),
        "<h2>One step over the devices</h2>",
        _timeline(first),
    ]
    if len(considered) > 1:
        sections += [
            f"<h2>Layouts considered: {len(considered)} that fit</h2>",
            _considered(considered, best),
        ]
    if len(best) > 1:
        sections += ["<h2>Why, and why not</h2>", _reasons(best)]
    sections += ["<h2>With other numbers of devices</h2>", _neighbours(first, model, hardware)]
    sections += ["<h2>The arithmetic</h2>", f"<pre>{escape(explain(first))}</pre>"]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def _summary(p: Prediction) -> str:
    memory, limit = p.memory_bytes_per_rank / 1e9, p.hardware.device.memory_bytes / 1e9
    verdict = "" if p.fits else ' <span class="no">does not fit</span>'
    return (
        f'<p class="big">{escape(p.layout.describe())}{verdict}</p>'
        f"<p>{p.step_seconds:.4g} s per step of {p.layout.batch} × {p.layout.sequence} tokens; "
        f"four of five such steps are expected between {p.interval.low:.3g} and "
        f"{p.interval.high:.3g} s. {p.tokens_per_second:,.0f} tokens per second, "
        f"{100 * p.utilization:.0f} % of the devices' peak, {memory:.1f} of {limit:.0f} GB on the "
        "fullest device.</p>"
    )


def _memory(p: Prediction) -> str:
    rows = []
    for stage, ranks in enumerate(p.memory.ranks):
        fullest = max(ranks, key=lambda rank: rank.total)
        parts = tuple(
            BarPart(name, getattr(fullest, name) / 1e9, color)
            for color, name in enumerate(_MEMORY_PARTS)
        )
        rows.append(Bar(f"stage {stage}" if p.layout.pp > 1 else "every rank", parts))
    limit = p.hardware.device.memory_bytes / 1e9
    return bars(rows, "GB", limit=limit) + f"<p>{legend(rows)}</p>"


def _parts(best: Sequence[Prediction]) -> str:
    rows = []
    for p in best:
        parts = tuple(
            BarPart(text, getattr(p.time, name), color)
            for color, (name, text) in enumerate(PART_NAMES.items())
        )
        size = f"{p.layout.tp} × {p.layout.pp} × {p.layout.dp}"
        rows.append(Bar(f"TP × PP × DP {size}" if p is best[0] else size, parts))
    return bars(rows, "s") + f"<p>{legend(rows)}</p>"


def _timeline(p: Prediction) -> str:
    """Every stage's forward and backward passes; then what follows the last backward."""
    order = pipeline_order(p.layout)
    if order is None:
        return "<p>Zero-bubble schedules are not drawn; the bars above have their parts.</p>"
    stages = stage_schedule(p.model, p.layout, p.hardware)
    chunks = p.layout.virtual_stages

    def seconds(action: Action) -> float:
        stage = stages[action.stage % p.layout.pp]
        return (stage.forward if action.kind == "forward" else stage.backward) / chunks

    boxes = [
        TimeBox(
            row,
            span.start,
            span.end,
            f"{span.action.kind} of microbatch {span.action.microbatch}, {span.seconds:.4g} s",
            0 if span.action.kind == "forward" else 1,
        )
        for row, spans in enumerate(simulate(order, seconds))
        for span in spans
    ]
    end = max(box.end for box in boxes)
    color = 2
    for name in ("pp_transfer", "stragglers", "dp_exposed", "optimizer"):
        length = getattr(p.time, name)
        if length > 0:
            text = f"{PART_NAMES[name]}, {length:.4g} s"
            boxes += [TimeBox(row, end, end + length, text, color) for row in range(p.layout.pp)]
            end, color = end + length, color + 1
    labels = [f"stage {row}" if p.layout.pp > 1 else "a rank" for row in range(p.layout.pp)]
    note = (
        "<p>Forward passes are blue, backward passes orange; what follows is drawn at the end, "
        "though parts of it run in between. Hold the pointer over a box.</p>"
    )
    return timeline(boxes, labels, end) + note


def _considered(considered: Sequence[Prediction], best: Sequence[Prediction]) -> str:
    chosen = {p.layout for p in best}
    found = [
        Point(
            p.memory_bytes_per_rank / 1e9,
            p.interval.middle,
            f"{p.layout.describe()}: {p.step_seconds:.4g} s, "
            f"{p.memory_bytes_per_rank / 1e9:.1f} GB",
            color=1 if p.layout in chosen else 0,
            marked=p.layout in chosen,
        )
        for p in considered
    ]
    note = "<p>Orange: the layouts compared above. To the left is less memory, below is faster.</p>"
    return points(found, "GB on the fullest device", "seconds per step") + note


def _reasons(best: Sequence[Prediction]) -> str:
    first, *others = best
    listed = "".join(f"<li>{escape(what_loses(first, other))}</li>" for other in others)
    return f"<p>{escape(why_first(first))}</p><ul>{listed}</ul>"


def _neighbours(first: Prediction, model: ModelShape, hardware: Hardware) -> str:
    """The best layouts with one node less and more, and twice as many, for the same batch."""
    devices, node = first.layout.devices, hardware.devices_per_node
    step = node if devices >= node else 1
    rows = []
    for count in sorted({devices - step, devices, devices + step, 2 * devices} - {0}):
        if count < 1:
            continue
        try:
            known = count == devices and first.fits  # the plan itself needs no search
            found = (
                (first,) if known else recommend(model, hardware, count, first.layout, keep=1).best
            )
        except ValueError as error:
            rows.append((count, escape(str(error)), "", ""))
            continue
        if not found:
            rows.append((count, "nothing fits", "", ""))
            continue
        (p,) = found
        speed = p.tokens_per_second
        change = f"{100 * (speed / first.tokens_per_second - 1):+.0f} %"
        rows.append((count, escape(p.layout.describe()), f"{p.step_seconds:.4g}", change))
    body = "".join(
        f'<tr><td class="n">{count}</td><td>{text}</td><td class="n">{seconds}</td>'
        f'<td class="n">{change}</td></tr>'
        for count, text, seconds, change in rows
    )
    return (
        '<table><tr><th class="n">devices</th><th>best layout, same batch</th>'
        f'<th class="n">s per step</th><th class="n">tokens/s</th></tr>{body}</table>'
    )
