"""How many devices a model needs to generate, and the alternatives."""

from __future__ import annotations

from dataclasses import replace

from colrow.planner.hardware import Hardware
from colrow.planner.inference import ServingPrediction, predict_serving
from colrow.planner.model import ModelShape
from colrow.planner.serving import Serving

NARROWER = ("fp8", "int8", "int4")


def recommend_serving(
    model: ModelShape, hardware: Hardware, devices: int | None, serving: Serving
) -> tuple[ServingPrediction, list[str]]:
    """The best way to generate, and notes that say why and what else would do.

    One device if the model fits; else the smallest tensor-parallel group inside a node that holds
    it; else pipeline stages of whole nodes. With ``devices`` given all of them are used: the
    smallest replica that fits, repeated. When nothing fits, the nearest miss.
    """
    limit = devices or 64 * hardware.devices_per_node
    candidates = _replicas(model, hardware, serving, limit)
    if not candidates:
        raise ValueError(f"{model.name} cannot be divided over {limit} devices")
    fitting = [p for p in candidates if p.fits]
    if not fitting:
        nearest = min(candidates, key=lambda p: p.memory_bytes_per_rank)
        return nearest, [
            f"Nothing fits on {_devices(limit)}; the nearest needs "
            f"{nearest.memory_bytes_per_rank / 1e9:.1f} GB per device.",
            *_more_devices(model, hardware, serving, limit),
            *_narrower(model, hardware, nearest.serving, limit),
        ]
    smallest = min(fitting, key=lambda p: p.serving.devices)
    notes = [_why(smallest)]
    chosen = smallest
    if devices and devices // smallest.serving.devices > 1:
        count = devices // smallest.serving.devices
        chosen = predict_serving(model, replace(smallest.serving, dp=count), hardware)
        notes.append(f"{count} replicas of it use {chosen.serving.devices} devices.")
    faster = min(fitting, key=lambda p: p.token_seconds)
    inside = faster.serving.tp <= hardware.devices_per_node
    if faster is not smallest and inside and faster.token_seconds < 0.8 * smallest.token_seconds:
        notes.append(
            f"For a shorter wait: {faster.serving.describe()} takes "
            f"{faster.token_seconds * 1e3:.3g} ms per token instead of "
            f"{smallest.token_seconds * 1e3:.3g}."
        )
    if smallest.serving.devices > 1:
        notes += _narrower(model, hardware, serving, smallest.serving.devices - 1)
    return chosen, notes


def _replicas(
    model: ModelShape, hardware: Hardware, serving: Serving, limit: int
) -> list[ServingPrediction]:
    node, found = hardware.devices_per_node, []
    sizes = [(tp, 1) for tp in (1, 2, 4, 8, 16, 32) if tp <= min(node, limit)]
    sizes += [(node, pp) for pp in range(2, 65) if node * pp <= limit]
    for tp, pp in sizes:
        if tp > model.num_heads or pp > model.config.num_layers:
            continue
        found.append(predict_serving(model, replace(serving, tp=tp, pp=pp, dp=1), hardware))
    return found


def _why(chosen: ServingPrediction) -> str:
    serving, device = chosen.serving, chosen.hardware.device
    needed, has = chosen.memory_bytes_per_rank / 1e9, device.memory_bytes / 1e9
    if serving.devices == 1:
        return f"It fits on one {device.name} ({needed:.1f} of {has:.0f} GB), so it is not cut."
    weights = chosen.model.parameters * 2 / 1e9
    text = (
        f"In 16 bit the parameters alone are {weights:.0f} GB; {serving.tp}-way tensor parallelism "
        f"inside a node"
    )
    if serving.pp > 1:
        text += f" and {serving.pp} pipeline stages of a node each"
    verb = "leave" if serving.pp > 1 else "leaves"
    return f"{text} {verb} {chosen.fullest.weights / 1e9:.2f} GB of weights on a device."


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _more_devices(model: ModelShape, hardware: Hardware, serving: Serving, limit: int) -> list[str]:
    """The fewest devices that hold the model as it is."""
    most = max(limit, 64 * hardware.devices_per_node)
    fitting = [p for p in _replicas(model, hardware, serving, most) if p.fits]
    if not fitting:
        return []
    found = min(fitting, key=lambda p: p.serving.devices)
    return [
        f"{_devices(found.serving.devices)} would do: {found.serving.describe()}, "
        f"{found.memory_bytes_per_rank / 1e9:.1f} GB per device. {_why(found)}"
    ]


def _narrower(model: ModelShape, hardware: Hardware, serving: Serving, limit: int) -> list[str]:
    """Quantisation as the alternative to more devices."""
    for weights in NARROWER:
        if weights == "fp8" and "fp8" not in dict(hardware.device.peak_flops):
            continue
        narrow = replace(serving, weights=weights, tp=1, pp=1, dp=1)
        for prediction in _replicas(model, hardware, narrow, limit):
            if prediction.fits:
                return [
                    f"With {weights} weights {_devices(prediction.serving.devices)} would do: "
                    f"{prediction.memory_bytes_per_rank / 1e9:.1f} GB per device."
                ]
    return []
