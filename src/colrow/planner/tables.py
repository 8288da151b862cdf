"""Predictions as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from colrow.layers.describe import Division
from colrow.planner.cost import Cost
from colrow.planner.inference import ServingPrediction
from colrow.planner.memory import RankMemory
from colrow.planner.model import ModelShape
from colrow.planner.predict import Prediction
from colrow.planner.reasons import PART_NAMES, what_loses, why_first
from colrow.planner.recommend import Recommendation
from colrow.planner.serving import ServingMemory, TokenTime
from colrow.planner.unequal import Split
from colrow.planner.users import Users


def show_model(console: Console, model: ModelShape, hardware_name: str, devices: int) -> None:
    """One line: what is planned."""
    active = ""
    if model.experts > 1:
        active = f", {_count(model.active_parameters)} active"
    console.print(
        f"[bold]{model.name}[/] ({_count(model.parameters)} parameters{active}) on {devices} × "
        f"{hardware_name}"
    )


def show_prediction(console: Console, prediction: Prediction) -> None:
    """One layout: the verdict, memory and time by part."""
    layout, device = prediction.layout, prediction.hardware.device
    verdict = "[green]fits[/]" if prediction.fits else "[red]does not fit[/]"
    interval = prediction.interval
    console.print(
        f"{layout.describe()}: [bold]{prediction.step_seconds:.4g} s[/] ({interval.low:.3g} to "
        f"{interval.high:.3g} s in four of five cases) per step of "
        f"{layout.batch} × {layout.sequence} tokens, "
        f"{_count(prediction.tokens_per_second)} tokens/s, "
        f"{100 * prediction.utilization:.0f}% MFU; "
        f"[bold]{prediction.memory_bytes_per_rank / 1e9:.1f} of {device.memory_bytes / 1e9:.0f} GB"
        f"[/] per device, {verdict}"
    )
    memory = prediction.memory.fullest
    left = [(f.name, getattr(memory, f.name), memory.total, 1e9) for f in fields(RankMemory)]
    right = [
        (PART_NAMES[name], getattr(prediction.time, name), prediction.step_seconds, 1.0)
        for name in PART_NAMES
    ]
    console.print(_side_by_side(("memory", "GB"), left, ("time", "s"), right))
    if layout.pp > 1:
        stages = ", ".join(
            f"{max(rank.total for rank in stage) / 1e9:.1f}" for stage in prediction.memory.ranks
        )
        console.print(f"GB by pipeline stage: {stages}")


def show_cost(console: Console, found: Cost) -> None:
    """Money and energy, as far as they are known."""
    parts = []
    if found.dollars_per_million_tokens is not None:
        parts.append(f"{found.dollars_per_million_tokens:.4g} per million tokens")
    if found.kilowatt_hours_per_million_tokens is not None:
        parts.append(f"{found.kilowatt_hours_per_million_tokens:.4g} kWh per million tokens")
    if found.hours is not None:
        whole = [f"{found.hours:,.1f} hours"]
        if found.dollars is not None:
            whole.append(f"{found.dollars:,.0f} in money")
        if found.kilowatt_hours is not None:
            whole.append(f"{found.kilowatt_hours:,.0f} kWh")
        parts.append("the run " + ", ".join(whole))
    console.print("[bold]Cost:[/] " + "; ".join(parts))


def show_recommendation(console: Console, recommendation: Recommendation) -> None:
    """The best layout in full, why, and what the others lose."""
    first, *others = recommendation.best
    console.print("[bold]Use[/]", end=" ")
    show_prediction(console, first)
    console.print(f"\n[bold]Why:[/] {why_first(first)}")
    if others:
        console.print("[bold]Why not:[/]")
    for other in others:
        console.print(f"  {what_loses(first, other)}")
    console.print(
        f"{recommendation.considered} layouts considered, {recommendation.rejected} of them do not "
        "fit in memory."
    )


def show_nothing_fits(
    console: Console, recommendation: Recommendation, changes: Sequence[str]
) -> None:
    """The nearest miss, and what would make it fit."""
    nearest = recommendation.nearest
    if nearest is None:
        return
    needed, has = nearest.memory_bytes_per_rank / 1e9, nearest.hardware.device.memory_bytes / 1e9
    console.print(
        f"[red]Nothing fits[/]: of {recommendation.considered} layouts the smallest, "
        f"{nearest.layout.describe()}, needs {needed:.1f} GB of {has:.0f} GB per device."
    )
    states = nearest.memory.fullest.model_states / 1e9
    console.print(f"{states:.1f} GB of them are weights, gradients and optimiser.")
    if changes:
        console.print("[bold]What would fit:[/]")
    for change in changes:
        console.print(f"  {change}")


def show_serving(console: Console, prediction: ServingPrediction) -> None:
    """One way of generating: the verdict, memory and time by part."""
    serving, device = prediction.serving, prediction.hardware.device
    verdict = "[green]fits[/]" if prediction.fits else "[red]does not fit[/]"
    console.print(
        f"{serving.describe()}: prefill of {serving.prompt} tokens "
        f"[bold]{prediction.prefill_seconds:.3g} s[/], [bold]{prediction.token_seconds * 1e3:.3g} "
        f"ms[/] per token, {prediction.tokens_per_second:.4g} tokens/s; "
        f"[bold]{prediction.memory_bytes_per_rank / 1e9:.1f} of {device.memory_bytes / 1e9:.0f} GB"
        f"[/] per device, {verdict}"
    )
    memory = prediction.fullest
    left = [(f.name, getattr(memory, f.name), memory.total, 1e9) for f in fields(ServingMemory)]
    right = [
        (f.name, getattr(prediction.token, f.name), prediction.token.total, 1e-3)
        for f in fields(TokenTime)
    ]
    console.print(_side_by_side(("memory", "GB"), left, ("time per token", "ms"), right))


def show_users(console: Console, found: Users | None, limit_ms: float | None) -> None:
    """What users see; ``limit_ms`` is the limit under which they were sought."""
    if found is None:
        console.print(f"[red]Not even one user's tokens come within {limit_ms:g} ms.[/]")
        return
    fits = "" if found.fits else " [red]Their keys and values do not fit.[/]"
    console.print(
        f"[bold]{found.users} users[/] of a replica: {found.token_seconds * 1e3:.3g} ms between "
        f"tokens, 19 of 20 within {found.token_seconds_p95 * 1e3:.3g} ms; the first token after "
        f"{found.first_token_seconds:.3g} s, 19 of 20 within "
        f"{found.first_token_seconds_p95:.3g} s; {found.tokens_per_second:.4g} tokens/s "
        f"together.{fits}"
    )


def show_splits(console: Console, splits: Sequence[Split]) -> None:
    """Unequal devices: both splits side by side."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("device", "share", "GB there"):
        table.add_column(heading, justify="right")
    for split in splits:
        table.add_column("layers" if split.kind == "layers" else "heads", justify="right")
        table.add_column(f"GB, as {split.kind}", justify="right")
    for index, available in enumerate(splits[0].available):
        row = [str(index), f"{splits[0].shares[index]:.2f}", f"{available / 1e9:.1f}"]
        for split in splits:
            needed = split.memory[index].total
            color = "green" if needed <= available else "red"
            row += [str(split.parts[index]), f"[{color}]{needed / 1e9:.1f}[/]"]
        table.add_row(*row)
    console.print(table)
    for split in splits:
        verdict = "[green]fits[/]" if split.fits else "[red]does not fit[/]"
        cost = (
            "devices work one after the other, and little is sent"
            if split.kind == "layers"
            else "devices work at the same time, with two all-reduces per layer"
        )
        console.print(f"As {split.kind}: {verdict}; {cost}.")


def show_models(console: Console, models: Sequence[ModelShape]) -> None:
    """The built-in models."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("model", "parameters", "active", "layers", "hidden", "heads", "source"):
        table.add_column(heading, justify="left" if heading in ("model", "source") else "right")
    for model in models:
        config = model.config
        heads = model.usual_block.attention.heads(Division(1))
        table.add_row(
            model.name,
            f"{model.parameters:,}",
            f"{model.active_parameters:,}",
            str(config.num_layers),
            str(config.hidden_size),
            f"{heads.query.length}/{heads.key_value.length}",
            model.source,
        )
    console.print(table)


def _side_by_side(
    left_heading: tuple[str, str],
    left: Sequence[tuple[str, float, float, float]],
    right_heading: tuple[str, str],
    right: Sequence[tuple[str, float, float, float]],
) -> Table:
    """Rows of ``(name, value, whole, unit)``, two to a line, without those that are zero.

    A heading names what is listed, and the unit.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for listed, measured_in in (left_heading, right_heading):
        table.add_column(listed)
        for heading in (measured_in, ""):
            table.add_column(heading, justify="right")
    columns = [[row for row in side if row[1] > 0] for side in (left, right)]
    for index in range(max(len(column) for column in columns)):
        cells: list[str] = []
        for column in columns:
            if index < len(column):
                name, value, whole, unit = column[index]
                cells += [name, f"{value / unit:.4g}", f"{100 * value / whole:.0f}%"]
            else:
                cells += ["", "", ""]
        table.add_row(*cells)
    return table


def _count(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"
