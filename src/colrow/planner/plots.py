"""Pictures of predictions; needs matplotlib, which the extra ``plots`` installs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from colrow.planner.memory import RankMemory
from colrow.planner.predict import Prediction
from colrow.planner.reasons import PART_NAMES


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure without a window, and its axes.

    Raises:
        ValueError: when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'colrow[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def plot_memory(prediction: Prediction, path: str | Path) -> None:
    """Memory of each pipeline stage's fullest rank, as stacked bars, against the device's."""
    figure, axes = _figure(8, 4.5)
    stages = [max(stage, key=lambda rank: rank.total) for stage in prediction.memory.ranks]
    names = [field.name for field in fields(RankMemory)]
    _stack(axes, names, [[getattr(s, name) / 1e9 for s in stages] for name in names], names)
    limit = prediction.hardware.device.memory_bytes / 1e9
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="pipeline stage", ylabel="GB per rank")
    figure.suptitle(_title(prediction), fontsize="small")
    axes.set_xticks(range(len(stages)))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def plot_time(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Step time of several layouts, as stacked bars."""
    figure, axes = _figure(9, 5)
    values = [[getattr(p.time, name) for p in predictions] for name in PART_NAMES]
    _stack(axes, list(PART_NAMES), values, list(PART_NAMES.values()))
    axes.set(ylabel="seconds per step", title=_title(predictions[0], layout=False))
    labels = [p.layout.describe().replace(" + ", "\n+ ").replace(", ", "\n") for p in predictions]
    axes.set_xticks(range(len(predictions)), labels, fontsize="x-small")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def plot_scaling(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Throughput against the number of devices, beside what linear scaling would give."""
    figure, axes = _figure(6, 4.5)
    counts = [p.layout.devices for p in predictions]
    speeds = [p.tokens_per_second for p in predictions]
    axes.loglog(counts, speeds, marker="o", label="predicted")
    ideal = [speeds[0] * count / counts[0] for count in counts]
    axes.loglog(counts, ideal, linestyle="--", color="gray", label="linear")
    for count, speed, p in zip(counts, speeds, predictions, strict=True):
        text = f"{p.layout.tp}×{p.layout.pp}×{p.layout.dp}"
        axes.annotate(text, (count, speed), fontsize="x-small", va="top")
    axes.set(
        xlabel="devices", ylabel="tokens per second", title=_title(predictions[0], layout=False)
    )
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


def _stack(
    axes: Any, names: Sequence[str], values: Sequence[Sequence[float]], labels: Sequence[str]
) -> None:
    bottom = [0.0] * len(values[0])
    for index, (name, heights) in enumerate(zip(names, values, strict=True)):
        if not any(heights):
            continue
        color = f"C{index % 10}"
        axes.bar(
            range(len(heights)),
            heights,
            bottom=bottom,
            label=labels[names.index(name)],
            color=color,
        )
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]


def _title(prediction: Prediction, *, layout: bool = True) -> str:
    text = f"{prediction.model.name} on {prediction.hardware.name}"
    return f"{text}: {prediction.layout.describe()}" if layout else text
