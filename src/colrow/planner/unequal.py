"""Devices of different memory: a model divided in proportion, as layers or as tensor shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from colrow.partition import Partition
from colrow.planner.hardware import Hardware
from colrow.planner.inference import serving_memory
from colrow.planner.model import ModelShape
from colrow.planner.serving import Serving, ServingMemory


@dataclass(frozen=True)
class Split:
    """A model over unequal devices.

    Attributes:
        kind: "layers" (each device holds whole layers, as llama.cpp's layer split) or "tensors"
            (each device holds its share of every layer).
        shares: asked for, adding up to 1.
        parts: what each device got: layers, or query heads.
        memory: of each device.
        available: bytes of each device.
    """

    kind: Literal["layers", "tensors"]
    shares: tuple[float, ...]
    parts: tuple[int, ...]
    memory: tuple[ServingMemory, ...]
    available: tuple[float, ...]

    @property
    def fits(self) -> bool:
        """Whether every device has enough."""
        return all(m.total <= a for m, a in zip(self.memory, self.available, strict=True))

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "kind": self.kind,
            "shares": list(self.shares),
            "parts": list(self.parts),
            "memory_bytes": [memory.total for memory in self.memory],
            "available_bytes": list(self.available),
            "fits": self.fits,
        }


def split_unequal(
    model: ModelShape,
    serving: Serving,
    hardware: Hardware,
    memory_bytes: Sequence[float],
    shares: Sequence[float] = (),
) -> tuple[Split, Split]:
    """The split into layers and the split into tensors; shares are those of memory by default.

    Raises:
        ValueError: for shares that do not match the devices, or leave a device without a layer or
            a head.
    """
    if not memory_bytes or min(memory_bytes) <= 0:
        sizes = ", ".join(f"{size / 1e9:g}" for size in memory_bytes)
        raise ValueError(f"device memory of {sizes} GB: every device needs some")
    weights = tuple(shares) or tuple(memory_bytes)
    if len(weights) != len(memory_bytes):
        raise ValueError(f"{len(weights)} shares for {len(memory_bytes)} devices")
    if min(weights) <= 0:
        raise ValueError(f"shares {list(weights)}: every device needs a positive one")
    total = sum(weights)
    normal = tuple(weight / total for weight in weights)
    count, available = len(normal), tuple(float(size) for size in memory_bytes)
    layers = Partition.ratio(model.config.num_layers, normal).sizes
    if 0 in layers:
        raise ValueError(f"shares {list(weights)} leave a device without a layer")
    by_layers = replace(serving, tp=1, pp=count, dp=1, stage_layers=layers, tp_weights=())
    stages = serving_memory(model, by_layers, hardware)
    by_tensors = replace(serving, tp=count, pp=1, dp=1, stage_layers=(), tp_weights=normal)
    (ranks,) = serving_memory(model, by_tensors, hardware)
    division = model.division(count, normal)
    heads = model.usual_block.attention.heads(division).query.sizes
    return (
        Split("layers", normal, layers, tuple(stage[0] for stage in stages), available),
        Split("tensors", normal, heads, ranks, available),
    )
