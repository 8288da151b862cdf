"""Measurements as a picture; needs matplotlib, which the extra ``plots`` installs."""

from __future__ import annotations

from pathlib import Path

from colrow.bench.result import Measurement

PARTS = {
    "matmul": "matmul",
    "attention": "attention",
    "exposed": "communication, exposed",
    "rest": "everything else",
}


def check_picture(path: str, option: str = "--plot") -> None:
    """Raises ValueError when there will be no picture at ``path``; for before the work."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"{option} needs matplotlib: pip install 'colrow[plots]'") from error
    if Path(path).suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise ValueError(f"{option} {path}: the name should end in .png, .svg or .pdf")


def plot(measurements: list[Measurement], path: str) -> None:
    """Stacked bars of the slowest rank's time, for each subject, phase and size."""
    from matplotlib.figure import Figure

    subjects = list(dict.fromkeys(m.subject for m in measurements))
    figure = Figure(figsize=(1.5 + 4 * len(subjects), 4.5), layout="constrained")
    grid = figure.subplots(1, len(subjects), squeeze=False)[0]
    for axes, subject in zip(grid, subjects, strict=True):
        bars = [
            (f"{phase.phase}\ntp={m.tp}", phase)
            for m in measurements
            if m.subject == subject
            for phase in m.slowest
        ]
        bars.sort(key=lambda bar: [p.phase for p in measurements[0].slowest].index(bar[1].phase))
        bottom = [0.0] * len(bars)
        for index, (part, label) in enumerate(PARTS.items()):
            heights = [max(0.0, 1e3 * getattr(phase, part)) for _, phase in bars]
            axes.bar(range(len(bars)), heights, bottom=bottom, label=label, color=f"C{index}")
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        hidden = [1e3 * phase.hidden for _, phase in bars]
        axes.scatter(
            range(len(bars)), hidden, marker="_", color="black", label="communication, hidden"
        )
        axes.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize="small")
        axes.set(title=subject, ylabel="milliseconds, slowest rank")
    grid[0].legend(fontsize="small")
    figure.savefig(path)
