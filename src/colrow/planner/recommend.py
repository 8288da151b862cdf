"""Searches training layouts and says which is best, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout, Recompute
from colrow.planner.memory import training_memory
from colrow.planner.model import ModelShape
from colrow.planner.predict import Prediction, check_layout, predict
from colrow.planner.time import step_time

MICROBATCHES = (1, 2, 4, 8, 16)
MAX_CHUNKS = 8
# Two layouts this close are equally good as far as the planner can tell; the simpler one wins.
TIE = 0.02


@dataclass(frozen=True)
class Recommendation:
    """The best layouts, best first, and what was considered.

    Attributes:
        best: layouts that fit, one for each (tp, pp, dp), fastest first; near ties are ordered by
            simplicity.
        considered: number of layouts that were evaluated.
        rejected: number that do not fit in memory.
        nearest: the layout that needs least memory per device, when none fits.
        fitting: every layout that fits.
    """

    best: tuple[Prediction, ...]
    considered: int
    rejected: int
    nearest: Prediction | None
    fitting: tuple[Prediction, ...] = ()


def recommend(
    model: ModelShape, hardware: Hardware, devices: int, base: Layout, *, keep: int = 5
) -> Recommendation:
    """All layouts of ``devices`` devices that keep ``base``'s workload, ranked by time.

    Workload is what the search does not change: global batch, sequence, the context-parallel size,
    precision, optimiser and software. Tensor parallelism stays inside the node unless the model
    fits in no other way.

    Raises:
        ValueError: when no layout can run at all, with or without enough memory.
    """
    if devices < 1:
        raise ValueError(f"{devices} devices: at least 1 is needed")
    found = _search(model, hardware, devices, base, inside_node=True)
    if not found.fitting and devices > hardware.devices_per_node:
        wider = _search(model, hardware, devices, base, inside_node=False)
        nearest = min(
            (n for n in (found.nearest, wider.nearest) if n), key=lambda n: n[0], default=None
        )
        found = _Search(wider.fitting, found.considered + wider.considered, nearest)
    if not found.considered:
        raise ValueError(
            f"no layout of {devices} devices divides a global batch of {base.batch} sequences and "
            f"{model.config.num_layers} layers with {model.num_heads} heads; use another "
            "number of devices or another batch"
        )
    fitting = found.fitting
    grouped: dict[tuple[int, int, int], Prediction] = {}
    for prediction in sorted(fitting, key=lambda p: p.interval.middle):
        layout = prediction.layout
        grouped.setdefault((layout.tp, layout.pp, layout.dp), prediction)
    ranked = sorted(grouped.values(), key=lambda p: p.interval.middle)
    if ranked:
        limit = ranked[0].interval.middle * (1 + TIE)
        tied = [p for p in ranked if p.interval.middle <= limit]
        ranked = sorted(tied, key=_complexity) + ranked[len(tied) :]
    closest = None
    if not fitting and found.nearest:
        closest = predict(model, found.nearest[1], hardware)
    rejected = found.considered - len(fitting)
    return Recommendation(tuple(ranked[:keep]), found.considered, rejected, closest, tuple(fitting))


def _complexity(prediction: Prediction) -> tuple[int, int, float]:
    """Fewer cuts through the model first, then less time."""
    layout = prediction.layout
    cuts = (layout.pp > 1) + (layout.tp > 1) + (layout.recompute != "none")
    return cuts, layout.tp * layout.pp, prediction.step_seconds


@dataclass(frozen=True)
class _Search:
    fitting: list[Prediction]
    considered: int
    nearest: tuple[float, Layout] | None


def _search(
    model: ModelShape, hardware: Hardware, devices: int, base: Layout, *, inside_node: bool
) -> _Search:
    """Predictions for the layouts that fit; of the others only the one that needs least."""
    fitting: list[Prediction] = []
    considered, nearest = 0, None
    for layout in layouts(model, hardware, devices, base, inside_node=inside_node):
        try:
            check_layout(model, layout, hardware)
        except ValueError:
            continue  # this combination cannot run; the others decide
        considered += 1
        memory = training_memory(model, layout, hardware)
        needed = memory.fullest.total
        if needed <= hardware.device.memory_bytes:
            time = step_time(model, layout, hardware)
            fitting.append(Prediction(model, layout, hardware, memory, time))
        if nearest is None or needed < nearest[0]:
            nearest = needed, layout
    return _Search(fitting, considered, nearest)


def layouts(
    model: ModelShape, hardware: Hardware, devices: int, base: Layout, *, inside_node: bool
) -> Iterator[Layout]:
    """Every layout worth evaluating."""
    node = hardware.devices_per_node
    if devices % base.cp:
        return
    for tp in _divisors(devices // base.cp):
        if tp > model.num_heads or (tp <= node) != inside_node:
            continue
        for pp in _divisors(devices // (tp * base.cp)):
            dp = devices // (tp * pp * base.cp)
            if pp > model.config.num_layers or base.batch % dp:
                continue
            for size in MICROBATCHES:
                if base.batch % (dp * size):
                    continue
                for ep in _expert_sizes(model, dp):
                    yield from _variants(model, replace(base, ep=ep), tp, pp, dp, size)


def _expert_sizes(model: ModelShape, dp: int) -> list[int]:
    """How far experts can be divided over replicas: not at all, or by powers of two and fully."""
    if model.experts == 1:
        return [1]
    return [
        ep
        for ep in _divisors(math.gcd(dp, model.experts))
        if ep & (ep - 1) == 0 or ep == min(dp, model.experts)
    ]


def _variants(
    model: ModelShape, base: Layout, tp: int, pp: int, dp: int, microbatch: int
) -> Iterator[Layout]:
    """Recomputation, schedules, and ZeRO where there are replicas to divide over."""
    sequence_parallel = tp > 1 and base.local_sequence >= tp
    for recompute in _recomputations(base):
        for zero in (0, 1) if dp > 1 else (0,):
            layout = replace(
                base,
                tp=tp,
                pp=pp,
                dp=dp,
                microbatch=microbatch,
                global_batch=base.batch,
                sequence_parallel=sequence_parallel,
                recompute=recompute,
                zero=zero,
                schedule="1f1b",
                virtual_stages=1,
            )
            yield layout
            if pp == 1 and dp > 1 and tp == 1:
                yield replace(layout, zero=3)
            per_stage, rest = divmod(model.config.num_layers, pp)
            if pp == 1 or rest or layout.num_microbatches % pp:
                continue
            for chunks in range(2, min(per_stage, MAX_CHUNKS) + 1):
                if per_stage % chunks == 0:
                    yield replace(layout, schedule="interleaved", virtual_stages=chunks)


def _recomputations(base: Layout) -> tuple[Recompute, ...]:
    unfused = base.attention == "unfused" or not base.program.flash_attention
    return ("none", "selective", "full") if unfused else ("none", "full")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def smallest_change(model: ModelShape, hardware: Hardware, devices: int, base: Layout) -> list[str]:
    """When nothing fits: changes that would make it fit, the smallest first."""
    changes = []
    for count in _more_devices(model, hardware, devices, base):
        workload = replace(base, tp=1, pp=1, dp=1, ep=1, microbatch=1, global_batch=base.batch)
        try:
            found = recommend(model, hardware, count, workload, keep=1)
        except ValueError:
            continue
        if found.best:
            changes.append(
                f"{count} instead of {devices} devices ({found.best[0].layout.describe()})"
            )
            break
    for length in (base.sequence // 2, base.sequence // 4):
        if length < 128:
            break
        shorter = replace(base, sequence=length)
        found = recommend(model, hardware, devices, shorter, keep=1)
        if found.best:
            changes.append(f"sequences of {length} instead of {base.sequence} tokens")
            break
    if base.optimizer == "adamw":
        lighter = replace(base, optimizer="adamw-8bit")
        if recommend(model, hardware, devices, lighter, keep=1).best:
            changes.append("an optimiser with 8-bit states (adamw-8bit)")
    return changes


def _more_devices(
    model: ModelShape, hardware: Hardware, devices: int, base: Layout
) -> Iterator[int]:
    """Numbers of devices to try: from the fewest that can hold weights, gradients and states.

    Inside a node one by one, then whole nodes, then in steps of an eighth.
    """
    states = model.parameters * (base.itemsize + base.gradient_bytes + base.state_bytes)
    node = hardware.devices_per_node
    count = max(devices + 1, math.ceil(states / hardware.device.memory_bytes))
    if count > node:
        count = math.ceil(count / node) * node
    while count < 64 * max(devices, node):
        yield count
        count += 1 if count < node else max(node, count // 8 // node * node)


def scaling(model: ModelShape, hardware: Hardware, best: Prediction) -> list[Prediction]:
    """The best layouts of a quarter to four times as many devices, for the same global batch."""
    devices = best.layout.devices
    found: list[Prediction] = []
    for count in (devices // 4, devices // 2, devices, devices * 2, devices * 4):
        if count < 1 or (found and count == found[-1].layout.devices):
            continue
        try:
            result = recommend(model, hardware, count, best.layout, keep=1)
        except ValueError:
            continue
        found += result.best
    return found or [best]
