"""Predictions against published measurements: ``python -m benchmarks.planner.accuracy``.

Constants that were fitted, and to what, are listed in docs/planner.md; every row that no constant
was fitted to is a test of the model. A sweep, which has one model on the same devices in several
layouts, also shows what it costs to take the planner's choice instead of the best measured: the
regret.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from benchmarks.planner.published import Case, cases
from benchmarks.planner.sweeps import sweep_cases
from colrow.planner.block_time import block_time
from colrow.planner.interval import Interval
from colrow.planner.layout import Layout
from colrow.planner.predict import predict
from colrow.planner.time import StepTime


@dataclass(frozen=True)
class Result:
    """One row: what was measured and what is predicted, in seconds."""

    case: Case
    layout: Layout
    predicted: float
    memory_bytes: float
    time: StepTime | None = None
    interval: Interval | None = None

    @property
    def error(self) -> float:
        """Relative to the measurement; positive is too slow."""
        return self.predicted / self.case.seconds - 1

    @property
    def memory_error(self) -> float | None:
        """The same for the fullest rank's memory, where it was measured."""
        measured = self.case.memory_bytes
        return None if measured is None else self.memory_bytes / measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measurement lies in the predicted 80 % interval; blocks have none."""
        if self.interval is None:
            return None
        return self.interval.low <= self.case.seconds <= self.interval.high


def evaluate(case: Case) -> Result:
    """The prediction for one case: among unpublished settings the fastest that fits.

    When none fits, the one that needs least memory.
    """
    if case.part != "step":
        (layout,) = case.layouts
        block = block_time(case.model, case.model.usual_block, layout, case.hardware)
        return Result(case, layout, float(getattr(block, case.part)), 0.0)
    found = [predict(case.model, layout, case.hardware) for layout in case.layouts]
    fitting = [p for p in found if p.fits]
    if fitting:
        best = min(fitting, key=lambda p: p.step_seconds)
    else:
        best = min(found, key=lambda p: p.memory_bytes_per_rank)
    memory = best.memory.fullest
    needed = memory.total - (memory.reserve if case.allocated else 0.0)
    return Result(case, best.layout, best.step_seconds, needed, best.time, best.interval)


def family(table: str) -> str:
    """The program and machine that a table is about: the first word of its name."""
    return table.split()[0].rstrip(",")


@dataclass(frozen=True)
class Summary:
    """Errors of one table's rows that are alike in being fitted to or not, as fractions."""

    table: str
    calibrated: bool
    rows: int
    mean: float
    bias: float
    largest: float
    memory: float | None
    inside: float | None


def summarize(results: Sequence[Result]) -> list[Summary]:
    """One entry per table, or two where some rows were fitted to, in order of appearance."""
    tables: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        tables.setdefault((result.case.table, result.case.calibrated), []).append(result)
    found = []
    for (table, calibrated), rows in tables.items():
        memory = [abs(r.memory_error) for r in rows if r.memory_error is not None]
        inside = [float(r.inside) for r in rows if r.inside is not None]
        found.append(
            Summary(
                table,
                calibrated,
                len(rows),
                mean(abs(r.error) for r in rows),
                mean(r.error for r in rows),
                max(abs(r.error) for r in rows),
                mean(memory) if memory else None,
                mean(inside) if inside else None,
            )
        )
    return found


@dataclass(frozen=True)
class Regret:
    """How much longer than the best measured layouts those take that the planner puts first.

    Attributes:
        table: the sweep.
        choices: among how many sets of layouts of one model, batch and number of devices.
        median, mean, largest: of the fractions; 0 where the best measured layout is chosen.
    """

    table: str
    choices: int
    median: float
    mean: float
    largest: float


def regrets(results: Sequence[Result]) -> list[Regret]:
    """One entry per sweep in which layouts can be compared."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for r in results:
        if r.case.part == "step" and len(r.case.layouts) == 1:
            work = (r.layout.batch, r.layout.sequence, r.layout.devices, r.layout.precision)
            groups.setdefault((r.case.table, r.case.model, *work), []).append(r)
    tables: dict[str, list[float]] = {}
    for (table, *_), rows in groups.items():
        if len(rows) > 1:
            chosen = min(rows, key=lambda r: r.predicted)
            best = min(r.case.seconds for r in rows)
            tables.setdefault(str(table), []).append(chosen.case.seconds / best - 1)
    return [
        Regret(table, len(found), median(found), mean(found), max(found))
        for table, found in tables.items()
    ]


def report(results: Sequence[Result], *, rows: bool) -> str:
    """A table of tables; with ``rows`` every row too."""
    lines = []
    if rows:
        lines.append(f"{'table':44} {'row':38} {'measured':>9} {'predicted':>9} {'error':>7}")
        for r in results:
            lines.append(
                f"{r.case.table:44} {r.case.label:38} {r.case.seconds:9.4f} {r.predicted:9.4f} "
                f"{100 * r.error:+6.1f}%  {r.layout.describe()}"
            )
        lines.append("")
    lines.append(
        f"{'table':44} {'':12} {'rows':>4} {'mean':>6} {'bias':>7} {'max':>7} "
        f"{'inside':>6} {'memory':>7}"
    )
    for s in summarize(results):
        kind = "calibrated" if s.calibrated else "held out"
        lines.append(
            f"{s.table:44} {kind:12} {s.rows:4} {100 * s.mean:5.1f}% {100 * s.bias:+6.1f}% "
            f"{100 * s.largest:6.1f}%"
            + ("       " if s.inside is None else f" {100 * s.inside:5.0f}%")
            + ("" if s.memory is None else f" {100 * s.memory:6.1f}%")
        )
    lines += [
        "",
        f"{'layout chosen against the best measured':44} {'choices':>8} median   mean     max",
    ]
    for r in regrets(results):
        lines.append(
            f"{r.table:44} {r.choices:8} {100 * r.median:5.1f}% {100 * r.mean:5.1f}% "
            f"{100 * r.largest:6.1f}%"
        )
    return "\n".join(lines)


def plot(results: Sequence[Result], path: str) -> None:
    """Predicted against measured seconds, a colour per table; calibrated rows are hollow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots()
    for index, summary in enumerate(summarize(results)):
        key = (summary.table, summary.calibrated)
        rows = [r for r in results if (r.case.table, r.case.calibrated) == key]
        color = f"C{index % 10}"
        axes.scatter(
            [r.case.seconds for r in rows],
            [r.predicted for r in rows],
            marker="osD^"[index // 10 % 4],
            facecolors="none" if summary.calibrated else color,
            edgecolors=color,
            label=f"{summary.table} ({'calibrated' if summary.calibrated else 'held out'})",
        )
    low = min(r.case.seconds for r in results) / 1.5
    high = max(r.case.seconds for r in results) * 1.5
    for factor, style in ((1.0, "-"), (1.2, ":"), (0.8, ":")):
        axes.plot([low, high], [low * factor, high * factor], style, color="gray", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="measured seconds",
        ylabel="predicted seconds",
        title="Predicted against published times (dotted: ±20 %)",
    )
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables; ``--plot FILE`` draws them, ``--json FILE`` writes them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planner.accuracy", description=__doc__
    )
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--json", metavar="FILE", help="write every row")
    parser.add_argument("--plot", metavar="FILE", help="draw predicted against measured")
    args = parser.parse_args(argv)
    results = [evaluate(case) for case in cases() + sweep_cases()]
    print(report(results, rows=args.rows))
    if args.json:
        data = [
            {
                "table": r.case.table,
                "row": r.case.label,
                "calibrated": r.case.calibrated,
                "measured_seconds": r.case.seconds,
                "predicted_seconds": r.predicted,
                "error": r.error,
                "memory_error": r.memory_error,
                "layout": r.layout.describe(),
                "source": r.case.source,
            }
            for r in results
        ]
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
