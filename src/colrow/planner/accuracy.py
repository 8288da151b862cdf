"""Predictions against published measurements: ``python -m colrow.planner.accuracy``.

Constants that were fitted, and to what, are listed in docs/planner.md; every table that no constant
was fitted to is a test of the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colrow.planner.layout import Layout
from colrow.planner.predict import predict
from colrow.planner.published import Case, cases
from colrow.planner.time import block_time


@dataclass(frozen=True)
class Result:
    """One row: what was measured and what is predicted, in seconds."""

    case: Case
    layout: Layout
    predicted: float

    @property
    def error(self) -> float:
        """Relative to the measurement; positive is too slow."""
        return self.predicted / self.case.seconds - 1


def evaluate(case: Case) -> Result:
    """The prediction for one case: among unpublished settings the fastest that fits.

    When none fits, the one that needs least memory.
    """
    if case.part != "step":
        (layout,) = case.layouts
        block = block_time(case.model, layout, case.hardware)
        return Result(case, layout, float(getattr(block, case.part)))
    found = [predict(case.model, layout, case.hardware) for layout in case.layouts]
    fitting = [p for p in found if p.fits]
    if fitting:
        best = min(fitting, key=lambda p: p.step_seconds)
    else:
        best = min(found, key=lambda p: p.memory_bytes_per_rank)
    return Result(case, best.layout, best.step_seconds)


@dataclass(frozen=True)
class Summary:
    """Errors of one table, as fractions."""

    table: str
    calibrated: bool
    rows: int
    mean: float
    bias: float
    largest: float


def summarize(results: Sequence[Result]) -> list[Summary]:
    """One entry per table, in order of appearance."""
    tables: dict[str, list[Result]] = {}
    for result in results:
        tables.setdefault(result.case.table, []).append(result)
    return [
        Summary(
            table,
            rows[0].case.calibrated,
            len(rows),
            sum(abs(r.error) for r in rows) / len(rows),
            sum(r.error for r in rows) / len(rows),
            max(abs(r.error) for r in rows),
        )
        for table, rows in tables.items()
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
    lines.append(f"{'table':44} {'':12} {'rows':>4} {'mean':>6} {'bias':>6} {'max':>6}")
    for s in summarize(results):
        kind = "calibrated" if s.calibrated else "held out"
        lines.append(
            f"{s.table:44} {kind:12} {s.rows:4} {100 * s.mean:5.1f}% {100 * s.bias:+5.1f}% "
            f"{100 * s.largest:5.1f}%"
        )
    for kind, chosen in (("held out", False), ("calibrated", True)):
        errors = [abs(r.error) for r in results if r.case.calibrated == chosen]
        if errors:
            lines.append(
                f"{'all ' + kind:44} {'':12} {len(errors):4} "
                f"{100 * sum(errors) / len(errors):5.1f}% {'':6} {100 * max(errors):5.1f}%"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables; ``--plot FILE`` draws them, ``--json FILE`` writes them."""
    parser = argparse.ArgumentParser(prog="python -m colrow.planner.accuracy", description=__doc__)
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--json", metavar="FILE", help="write every row")
    parser.add_argument("--plot", metavar="FILE", help="draw predicted against measured")
    args = parser.parse_args(argv)
    results = [evaluate(case) for case in cases()]
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
                "layout": r.layout.describe(),
                "source": r.case.source,
            }
            for r in results
        ]
        Path(args.json).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        from colrow.planner.plots import plot_accuracy

        plot_accuracy(results, args.plot)


if __name__ == "__main__":
    main()
