"""Which part of a profiled run was matmuls and which attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from colrow.layers.decoding import BLAS_EVENT

_MATMULS = {
    f"aten::{name}"
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "mv",
        "addmv",
        "_addmm_activation",
        "mkldnn_linear",
    )
} | {"mkldnn::_linear_pointwise", BLAS_EVENT}
_ATTENTION = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
)
# Its sum over the features is a matrix-vector product; the norm is none of the model's matmuls.
_NORM = "_RMSNormBackward"
PREFIX = "colrow.bench:"


@dataclass
class Kernels:
    """Seconds and calls in matmuls and in attention."""

    seconds: dict[str, float] = field(default_factory=lambda: {"matmul": 0.0, "attention": 0.0})
    calls: dict[str, int] = field(default_factory=lambda: {"matmul": 0, "attention": 0})


def attribute(events: Iterable[Any], *, cuda: bool) -> dict[str, Kernels]:
    """Sums up a profile by phase.

    A phase is a ``record_function`` whose name starts with :data:`PREFIX`. An operation belongs to
    the phase in whose time it started, whichever thread ran it. Of operations inside each other the
    outermost counts: matmuls inside an attention kernel are attention, and a norm's are neither.

    Args:
        events: ``function_events`` of ``torch.autograd.profiler.profile``.
        cuda: take the time of the kernels on the device rather than that of the call.
    """
    listed = list(events)
    phases = [e for e in listed if e.name.startswith(PREFIX) and _on_cpu(e)]
    found = {event.name.removeprefix(PREFIX): Kernels() for event in phases}
    for event in listed:
        kind = _kind(event.name)
        if kind is None or not _on_cpu(event) or _inside_another(event):
            continue
        start = event.time_range.start
        for phase in phases:
            if phase.time_range.start <= start <= phase.time_range.end:
                kernels = found[phase.name.removeprefix(PREFIX)]
                micros = event.device_time_total if cuda else event.time_range.elapsed_us()
                kernels.seconds[kind] += micros / 1e6
                kernels.calls[kind] += 1
    return found


def _kind(name: str) -> str | None:
    if name in _MATMULS:
        return "matmul"
    return "attention" if name.startswith(_ATTENTION) else None


def _inside_another(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name == _NORM or _kind(parent.name) is not None:
            return True
        parent = parent.cpu_parent
    return False


def _on_cpu(event: Any) -> bool:
    return bool(event.device_type.name == "CPU")
