"""Results as JSON, with every sample, and as a table for people."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from benchmarks.peers.race import Entry
from benchmarks.peers.workloads import Decoding, Workload, as_dict

VERSIONS = ("torch", "transformers", "colrow", "numpy")
HEADINGS = {
    "step_seconds": "step",
    "token_seconds": "per token",
    "first_token_seconds": "first token",
}


def machine(cores: int) -> dict[str, object]:
    """Where and with what this was measured."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": cores,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (samples[0],) * 3
    return {
        "median": statistics.median(samples),
        "quartile_low": low,
        "quartile_high": high,
        "min": min(samples),
        "max": max(samples),
        "count": len(samples),
    }


def metrics(workload: Workload) -> tuple[str, ...]:
    """What is timed, the decisive one first."""
    decoding = isinstance(workload, Decoding)
    return ("token_seconds", "first_token_seconds") if decoding else ("step_seconds",)


def results(workload: Workload, entries: Sequence[Entry]) -> dict[str, object]:
    """One workload for JSON."""
    return {
        "workload": as_dict(workload),
        "contestants": [
            {
                "name": entry.contestant.name,
                "label": entry.contestant.label,
                "ranks": entry.contestant.ranks,
                "engine": entry.engine or None,
                "problem": entry.problem or None,
                "checked": entry.checked,
                "summary": {
                    metric: summary(entry.samples(metric))
                    for metric in metrics(workload)
                    if entry.samples(metric)
                },
                "turns": entry.turns,
            }
            for entry in entries
        ],
    }


def table(workload: Workload, entries: Sequence[Entry]) -> str:
    """One workload in Markdown: milliseconds, and how many times the reference's speed."""
    names = metrics(workload)
    heads = ["contestant", "engine"]
    for name in names:
        heads += [f"{HEADINGS[name]} (ms)", "quartiles", "speed"]
    if isinstance(workload, Decoding):
        heads.append("tokens/s")
    lines = [f"**{workload.describe}**", "", _row(heads), _row(["---"] * len(heads))]
    base = {n: _median(entries[0], n) for n in names}
    for entry in entries:
        cells = [entry.contestant.label, entry.engine or "-"]
        if entry.problem:
            lines.append(_row([*cells, f"not timed: {entry.problem}"]))
            continue
        for name in names:
            found = summary(entry.samples(name))
            quartiles = f"{1e3 * found['quartile_low']:.1f} - {1e3 * found['quartile_high']:.1f}"
            first = base[name]
            speed = "-" if first is None else f"{first / found['median']:.2f}"
            cells += [f"{1e3 * found['median']:.1f}", quartiles, speed]
        if isinstance(workload, Decoding):
            cells.append(f"{1 / summary(entry.samples(names[0]))['median']:.1f}")
        lines.append(_row(cells))
    lines += ["", f"speed: times as fast as {entries[0].contestant.label}.", ""]
    return "\n".join(lines)


def _median(entry: Entry, metric: str) -> float | None:
    samples = entry.samples(metric)
    return statistics.median(samples) if samples else None


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
