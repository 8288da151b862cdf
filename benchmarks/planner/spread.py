"""Fits the planner's 80 % intervals to published rows: ``python -m benchmarks.planner.spread``.

What is minimised is the mean interval score of the logarithms (Gneiting and Raftery 2007, section
6.2), which is best for the central interval that really holds 80 %; every family of tables counts
the same. The fit is repeated without each family, and the intervals so found are checked on the
family that was left out, as on a program and a machine that nobody has seen; they are widened until
the families that were left out hold 80 % in the mean.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import mean

from benchmarks.planner.accuracy import evaluate, family
from benchmarks.planner.published import cases
from benchmarks.planner.sweeps import sweep_cases
from colrow.planner.interval import SPREAD, Spread, Waits

MISSED = 0.2
MOST_ROWS = 60
STEPS = (0.6, 0.85, 0.95, 1.05, 1.2, 1.6)
# What waits, and the measured time over the predicted one.
Row = tuple[Waits, float]


def score(rows: Sequence[Row], spread: Spread) -> float:
    """The interval score of one family: width, and ten times what misses it."""
    found = 0.0
    for waits, ratio in rows:
        low, _, high = waits.factors(spread)
        outside = max(0.0, math.log(low / ratio), math.log(ratio / high))
        found += math.log(high / low) + 2 / MISSED * outside
    return found / len(rows)


def held(rows: Sequence[Row], spread: Spread) -> float:
    """The share of rows inside."""
    factors = [(waits.factors(spread), ratio) for waits, ratio in rows]
    return mean(float(low <= ratio <= high) for (low, _, high), ratio in factors)


def fit(families: Sequence[Sequence[Row]], start: Spread) -> Spread:
    """The spread with the least mean score, one number after the other until none improves."""

    def total(spread: Spread) -> float:
        return mean(score(rows, spread) for rows in families)

    best, least = start, total(start)
    improved = True
    while improved:
        improved = False
        for name, value in asdict(best).items():
            for step in STEPS:
                candidate = replace(best, **{name: value * step})
                found = total(candidate)
                if found < least - 1e-4:
                    best, least, improved = candidate, found, True
    return best


def main() -> None:
    """Prints the fit to all families, and what each family holds with the fit to the others."""
    argparse.ArgumentParser(prog="python -m benchmarks.planner.spread", description=__doc__)
    families: dict[str, list[Row]] = {}
    for case in cases() + sweep_cases():
        result = evaluate(case)
        if result.time is not None and not case.calibrated:
            waits = Waits.of(result.time, result.layout, case.hardware)
            row = waits, case.seconds / result.predicted
            families.setdefault(family(case.table), []).append(row)
    # Every family counts the same however many rows it has, so a part of the long ones will do.
    families = {
        name: rows[:: -(-len(rows) // MOST_ROWS)] for name, rows in sorted(families.items())
    }
    everything = fit(list(families.values()), SPREAD)
    others = {
        name: fit([rows for other, rows in families.items() if other != name], everything)
        for name in families
    }
    for percent in range(100, 200, 5):
        wide = {name: widened(spread, percent / 100) for name, spread in others.items()}
        found = {name: held(rows, wide[name]) for name, rows in families.items()}
        if mean(found.values()) >= 1 - MISSED:
            break
    print(f"fitted, and widened to {percent} %:", widened(everything, percent / 100))
    for name, rows in families.items():
        print(f"{name:16} {len(rows):4} rows: {100 * found[name]:3.0f} % inside when left out")
    print(f"mean of the families: {100 * mean(found.values()):.0f} %")


def widened(spread: Spread, factor: float) -> Spread:
    """All deviations so many times as large, and the biases as they are."""
    scaled = {name: value * factor for name, value in asdict(spread).items() if "bias" not in name}
    return replace(spread, **scaled)


if __name__ == "__main__":
    main()
