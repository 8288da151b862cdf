"""Measurements as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colrow.bench.result import BenchSettings, Measurement, PhaseTime, speedups

if TYPE_CHECKING:
    from rich.console import Console

# Beyond this the profiler, or another process, took so much time that the parts are off.
_DISTURBED = 1.5


def show(console: Console, settings: BenchSettings, measurements: list[Measurement]) -> None:
    """Prints where the time goes by subject, size, rank and phase, and how the sizes compare."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    subjects = list(dict.fromkeys(m.subject for m in measurements))
    sequence = ", sequence parallel" if settings.sequence_parallel else ""
    work = f"decoding after {settings.sequence} tokens" if settings.decode else "training"
    table = Table(
        title=f"Milliseconds of {work}: batch {settings.batch}"
        + ("" if settings.decode else f" x {settings.sequence}")
        + f", {settings.dtype}{sequence}, {measurements[0].device}",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for column in ("tp", "rank", "phase"):
        table.add_column(column, no_wrap=True)
    for column in ("total", "matmul", "attention", "exposed", "rest", "hidden"):
        table.add_column(column, justify="right", no_wrap=True)
    subject = ""
    for measurement in sorted(measurements, key=lambda m: subjects.index(m.subject)):
        if measurement.subject != subject:
            subject = measurement.subject
            table.add_section()
            table.add_row("", "", f"[bold]{subject}[/]")
        for rank, phases in enumerate(measurement.ranks):
            table.add_section()
            for phase in phases:
                table.add_row(
                    str(measurement.tp),
                    str(rank),
                    phase.phase,
                    *(f"{1e3 * value:.2f}" for value in _columns(phase)),
                )
    console.print(table)
    console.print(
        "total = matmul + attention + exposed (waiting for communication) + rest (everything "
        "else); hidden communication ran beside them."
    )
    faster = speedups(measurements)
    unit = "token" if settings.decode else "step"
    for m in sorted(measurements, key=lambda m: subjects.index(m.subject)):
        speed = ""
        if m.tp > 1 and (m.subject, m.tp) in faster:
            speed = f", {faster[m.subject, m.tp]:.2f} times as fast as one process"
        engine = f" on {m.engine}" if m.engine else ""
        threads = f"{m.threads} thread{'s' if m.threads > 1 else ''} a rank"
        console.print(
            f"{m.subject}, tp={m.tp} ({threads}{engine}): {1e3 * m.seconds:.2f} ms per {unit}, "
            f"{m.tokens_per_second:,.0f} tokens/s{speed}",
            soft_wrap=True,
        )
    if any(
        phase.profiled_seconds > _DISTURBED * phase.seconds
        for m in measurements
        for phases in m.ranks
        for phase in phases
    ):
        console.print(
            "[yellow]The profiled runs took more than "
            f"{_DISTURBED} times as long as the timed ones: the machine is busy, or the kernels "
            "are so short that the parts are only rough. The totals are not affected.[/]"
        )


def _columns(phase: PhaseTime) -> tuple[float, ...]:
    return (
        phase.seconds,
        phase.matmul,
        phase.attention,
        phase.exposed,
        phase.rest,
        phase.hidden,
    )
