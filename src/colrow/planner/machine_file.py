"""Machines described by a file: TOML by hand, or JSON as a benchmark writes it.

Both have the same keys::

    name = "two cores"
    devices_per_node = 2

    [device]
    memory_gigabytes = 8
    memory_gigabytes_per_second = 12.5
    peak_teraflops = { fp32 = 0.08 }       # matmul, by precision
    sustained_fraction = 1.0               # what a long matmul reaches of it
    processors = 132                       # multiprocessors; left out: no tile model
    cpu = false                            # ranks of a CPU host: no CUDA context, no launches
    watts = 700                            # at full load, for costs
    host_gigabytes_per_second = 50         # to the host's memory, for --offload-layers
    kernel_microseconds = 2
    flash_attention = true
    matmul = [[flops, seconds], ...]       # measured; replaces the roofline's peak

    [[link]]                               # measured collectives inside a node
    op = "all_reduce"
    ranks = 2
    message_bytes = [65536, 1048576, 16777216]
    seconds = [0.0001, 0.0007, 0.01]

    [[network]]                            # the same between nodes; or
    gigabytes_per_second = 12.0            # plain numbers, here and for a link
    latency_microseconds = 20

``message_bytes`` counts the whole buffer, as the ledger does. With ``base = "a100-80gb"`` only what
differs from built-in hardware need be given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from colrow.files import CONFIG_BYTES, SETTINGS_BYTES, parse_json, parse_toml, read_text, shown
from colrow.planner.hardware import Device, Hardware, find_hardware
from colrow.planner.links import Link, measured_link
from colrow.planner.node_links import COLLECTIVE_START_SECONDS

_DEVICE_KEYS = {
    "name",
    "memory_gigabytes",
    "memory_gigabytes_per_second",
    "peak_teraflops",
    "sustained_fraction",
    "processors",
    "cpu",
    "watts",
    "host_gigabytes_per_second",
    "kernel_microseconds",
    "flash_attention",
    "stream_fraction",
    "matmul",
}
_TOP_KEYS = {"name", "base", "devices_per_node", "device", "link", "network"}
_LINK_KEYS = {
    "op",
    "ranks",
    "message_bytes",
    "seconds",
    "gigabytes_per_second",
    "latency_microseconds",
}
_REQUIRED = ("memory_gigabytes", "memory_gigabytes_per_second", "peak_teraflops")


def load_machine(path: str | Path) -> Hardware:
    """Reads a machine file.

    Raises:
        ValueError: when the file is missing, is not TOML or JSON, or lacks or misnames something.
    """
    file = Path(path)
    try:
        text = read_text(file, CONFIG_BYTES if file.suffix == ".json" else SETTINGS_BYTES)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text: {error}") from error
    try:
        data = parse_json(text) if file.suffix == ".json" else parse_toml(text)
    except ValueError as error:
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise ValueError(f"{file} is not {kind}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} should be a table")
    try:
        return machine_from_mapping(data, default_name=file.stem)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def machine_from_mapping(data: Mapping[str, object], *, default_name: str) -> Hardware:
    """The machine that these keys describe; see the module for the format."""
    _check_keys("the file", data, _TOP_KEYS)
    base = find_hardware(str(data["base"])) if "base" in data else None
    name = str(data.get("name", base.name if base else default_name))
    device = _device(_table(data, "device"), base.device if base else None, name)
    link = _link(data.get("link"), "link") or (base.link if base else None)
    network = _link(data.get("network"), "network") or (base.network if base else None)
    if link is None:
        link = network
    if link is None:
        # A single device: nothing is sent, any link will do.
        link = Link(1e9, COLLECTIVE_START_SECONDS, source="not described")
    per_node = data.get("devices_per_node", base.devices_per_node if base else 1)
    return Hardware(name, device, int(_number("devices_per_node", per_node)), link, network or link)


def _device(data: Mapping[str, object], base: Device | None, name: str) -> Device:
    _check_keys("[device]", data, _DEVICE_KEYS)
    missing = [key for key in _REQUIRED if key not in data]
    if base is None and missing:
        raise ValueError(f"[device] lacks {', '.join(missing)}")
    device = base or Device(name, 1.0, 1.0, (), 1.0, 0)
    values: dict[str, object] = {"name": str(data.get("name", base.name if base else name))}
    for key, field, unit in (
        ("memory_gigabytes", "memory_bytes", 1e9),
        ("memory_gigabytes_per_second", "memory_bandwidth", 1e9),
        ("sustained_fraction", "sustained_fraction", 1.0),
        ("kernel_microseconds", "kernel_seconds", 1e-6),
        ("stream_fraction", "stream_fraction", 1.0),
        ("host_gigabytes_per_second", "host_bandwidth", 1e9),
    ):
        if key in data:
            values[field] = _number(key, data[key]) * unit
    if "processors" in data:
        values["processors"] = int(_number("processors", data["processors"], zero=True))
    for key, field in (("flash_attention", "flash_attention"), ("cpu", "on_host")):
        if key in data:
            if not isinstance(data[key], bool):
                raise ValueError(f"{key}={data[key]!r}: must be true or false")
            values[field] = data[key]
    if "watts" in data:
        values["watts"] = _number("watts", data["watts"])
    if "peak_teraflops" in data:
        peaks = _table(data, "peak_teraflops")
        values["peak_flops"] = tuple((k, _number(k, v) * 1e12) for k, v in peaks.items())
    if "matmul" in data:
        values["matmul_curve"] = _matmul_curve(data["matmul"])
    return replace(device, **values)  # type: ignore[arg-type]


def _matmul_curve(points: object) -> tuple[tuple[float, float], ...]:
    if not isinstance(points, list) or not points:
        raise ValueError("matmul must be a list of [flops, seconds]")
    curve = {}
    for point in points:
        if not isinstance(point, list) or len(point) != 2:
            raise ValueError(f"matmul: {point!r} is not [flops, seconds]")
        flops, seconds = _number("flops", point[0]), _number("seconds", point[1])
        curve[flops] = flops / seconds
    return tuple(sorted(curve.items()))


def _link(entries: object, name: str) -> Link | None:
    if entries is None:
        return None
    if isinstance(entries, Mapping):
        entries = [entries]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"[[{name}]] must be one or more tables")
    measurements = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ValueError(f"[[{name}]]: {entry!r} is not a table")
        _check_keys(f"[[{name}]]", entry, _LINK_KEYS)
        if "gigabytes_per_second" in entry:
            speed = _number("gigabytes_per_second", entry["gigabytes_per_second"]) * 1e9
            latency = _number("latency_microseconds", entry.get("latency_microseconds", 10))
            return Link(speed, latency * 1e-6, source="file")
        op = entry.get("op")
        if op not in ("all_reduce", "all_gather", "reduce_scatter"):
            raise ValueError(
                f"[[{name}]]: op={op!r} must be all_reduce, all_gather or reduce_scatter"
            )
        sizes, seconds = (_numbers(key, entry.get(key)) for key in ("message_bytes", "seconds"))
        if len(sizes) != len(seconds):
            raise ValueError(
                f"[[{name}]]: {len(sizes)} message_bytes and {len(seconds)} seconds do not match"
            )
        ranks = int(_number("ranks", entry.get("ranks")))
        measurements.append((str(op), ranks, sizes, seconds))
    return measured_link(measurements, "measured, from a file")


def _check_keys(where: str, data: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(
            f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )


def _table(data: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = data.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a table")
    return value


def _number(key: str, value: object, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key}={shown(value)}: must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{key}={value}: must be a finite number")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{key}={value}: must be positive")
    return float(value)


def _numbers(key: str, value: object) -> list[float]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of numbers")
    return [_number(key, item) for item in value]
