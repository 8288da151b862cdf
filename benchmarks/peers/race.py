"""The race: everybody's numbers are compared, then everybody is timed in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.processes import ContestantError, Processes
from benchmarks.peers.workloads import Decoding, Quantised, Workload

# Relative differences of the loss to the first contestant's.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "quantised": 5e-2}
Say = Callable[[str], None]


@dataclass
class Entry:
    """One contestant on one engine.

    Attributes:
        checked: the numbers that are compared: losses, and tokens when decoding.
        turns: by turn, the samples of each metric in seconds: of the slowest rank.
        problem: why it was not timed; "" when it was.
    """

    contestant: Contestant
    engine: str
    checked: dict[str, list[float]] = field(default_factory=dict)
    turns: list[dict[str, list[float]]] = field(default_factory=list)
    problem: str = ""

    def samples(self, metric: str) -> list[float]:
        """Of all turns."""
        return [value for turn in self.turns for value in turn.get(metric, [])]

    @property
    def label(self) -> str:
        """For progress and tables."""
        return f"{self.contestant.label} ({self.engine})" if self.engine else self.contestant.label


def run(
    workload: Workload,
    directory: Path,
    chosen: Sequence[Contestant],
    engines: Sequence[str],
    *,
    turns: int,
    cores: int,
    say: Say,
) -> list[Entry]:
    """Starts all, compares, and gives each ``turns`` turns, one contestant at a time.

    Args:
        chosen: the first is the reference of the comparison.
        engines: each contestant of several ranks takes part once on each.
        cores: threads of a contestant with one process.
    """
    entries = [
        Entry(contestant, engine)
        for contestant in chosen
        for engine in (engines if contestant.split else ("",))
        if engine != "mpi" or contestant.ranks <= cores  # its ranks wait by polling
    ]
    with ExitStack() as stack:
        running: list[tuple[Entry, Processes]] = []
        for entry in entries:
            started = time.monotonic()
            try:
                processes = Processes(
                    workload,
                    entry.contestant,
                    threads=1 if entry.contestant.split else cores,
                    directory=directory,
                    engine=entry.engine,
                )
                stack.enter_context(closing(processes))
                entry.checked = processes.ask("check")[0]
                reference = next(e.checked for e in entries if e.checked)
                entry.problem = difference(workload, entry.checked, reference)
            except ContestantError as error:
                entry.problem = str(error)
            verdict = entry.problem or f"loss {entry.checked['losses'][-1]:.6f}"
            say(f"{entry.label}: {verdict} ({time.monotonic() - started:.0f} s)")
            if not entry.problem:
                running.append((entry, processes))
        for turn in range(turns):
            for entry, processes in _rotated(running, turn):
                try:
                    entry.turns.append(_slowest(processes.ask("measure")))
                except ContestantError as error:
                    entry.problem, entry.turns = str(error), []
                    running.remove((entry, processes))
            say(f"turn {turn + 1} of {turns}")
    return entries


def difference(
    workload: Workload, found: dict[str, list[float]], reference: dict[str, list[float]]
) -> str:
    """Why these numbers are not the reference's; "" when they are.

    Losses agree within :data:`TOLERANCES`; in fp32 greedy tokens are equal.
    """
    dtype = workload.dtype if isinstance(workload, Decoding) else "float32"
    if isinstance(workload, Quantised):
        dtype = "quantised"
    limit = TOLERANCES[dtype]
    for index, (a, b) in enumerate(zip(found["losses"], reference["losses"], strict=True)):
        if not math.isfinite(a) or abs(a - b) > limit * abs(b):
            return f"computes something else: loss {index} is {a:.6f}, the reference's {b:.6f}"
    if dtype == "float32" and found.get("tokens") != reference.get("tokens"):
        return "computes something else: its greedy tokens are not the reference's"
    return ""


def _rotated(
    running: list[tuple[Entry, Processes]], turn: int
) -> Iterator[tuple[Entry, Processes]]:
    """Everybody once, another one first each time."""
    start = turn % len(running) if running else 0
    yield from [*running[start:], *running[:start]]


def _slowest(by_rank: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Sample by sample, the slowest rank's."""
    return {
        metric: [max(values) for values in zip(*(r[metric] for r in by_rank), strict=True)]
        for metric in by_rank[0]
    }
