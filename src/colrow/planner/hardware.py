"""What a device computes, holds and sends: the built-in GPUs and their nodes.

A gigabyte is 10^9 bytes throughout.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cache

from colrow.planner.data import read_table
from colrow.planner.links import Curve, Link

Precision = str  # "fp32", "fp16", "bf16" or "fp8"


@dataclass(frozen=True)
class Device:
    """One GPU, or one rank of a CPU host.

    Attributes:
        name: as shown.
        memory_bytes: of the device.
        memory_bandwidth: bytes per second of its memory, peak.
        peak_flops: per precision, of dense matmuls, from the data sheet.
        sustained_fraction: share of the 16-bit peak that a large matmul of random numbers holds
            for seconds, when power and not the data sheet's clock is the limit. Measured.
        processors: multiprocessors (SMs) over which the tiles of a matmul are spread; 0 switches
            the tile model off (CPUs).
        stream_fraction: share of ``memory_bandwidth`` that an elementwise kernel reaches.
        kernel_seconds: a kernel's launch and ramp, during which it does no work.
        speed_spread: standard deviation of the speed of devices of this kind, as a fraction.
        flash_attention: whether a fused attention kernel exists for it.
        matmul_curve: measured ``(FLOPs of a matmul, FLOP/s)``, ascending, for devices that are
            described by measurements rather than by tiles; empty otherwise.
        source: where the numbers come from.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: tuple[tuple[Precision, float], ...]
    sustained_fraction: float
    processors: int
    stream_fraction: float = 0.85
    kernel_seconds: float = 4e-6
    speed_spread: float = 0.0
    flash_attention: bool = True
    matmul_curve: tuple[tuple[float, float], ...] = ()
    source: str = ""

    def flops(self, precision: Precision) -> float:
        """Peak of dense matmuls at this precision, FLOP/s.

        Raises:
            ValueError: when the device has no such matmul.
        """
        peaks = dict(self.peak_flops)
        if precision not in peaks:
            known = ", ".join(sorted(peaks))
            raise ValueError(f"{self.name} has no {precision} matmul; it has {known}")
        return peaks[precision]


@dataclass(frozen=True)
class Hardware:
    """Devices, nodes and links.

    Attributes:
        name: as shown.
        device: one of the (equal) devices.
        devices_per_node: behind one fast link.
        link: between the devices of a node.
        network: from one device to other nodes (its share of the node's adapters).
    """

    name: str
    device: Device
    devices_per_node: int
    link: Link
    network: Link

    def __post_init__(self) -> None:
        if self.devices_per_node < 1:
            raise ValueError(f"devices_per_node={self.devices_per_node}: must be at least 1")

    def with_devices_per_node(self, count: int) -> Hardware:
        """The same devices in nodes of another size."""
        return replace(self, devices_per_node=count)


# What NCCL's own cost model assumes for one more inter-node or intra-node step of a ring (Simple
# protocol), and for starting: NVIDIA/nccl 5067397c, src/graph/tuning.cc, hwLat and baseLat.
NETWORK_HOP_SECONDS = 14.0e-6
NODE_HOP_SECONDS = 3.4e-6
COLLECTIVE_START_SECONDS = 8.4e-6
# Best all-reduce bus bandwidth over one adapter and its data sheet: 24 of 25 GB/s (200 Gbit/s) and
# 48 of 50 GB/s (400 Gbit/s), NVIDIA GTC24 S62129.
NETWORK_FRACTION = 0.96

# Sustained matmul rates of 40 H200 lie within 4.5 % of each other (stas00/ml-engineering,
# accelerator/benchmarks); the range of 40 normal values is 4.3 standard deviations.
SPEED_SPREAD = 0.045 / 4.3

_SPEC = "data sheet; stas00/ml-engineering 744d01e, compute/accelerator"
_SUSTAINED_HOPPER = (
    "; sustained 698.6 TFLOP/s: mean of 8 busy H200, stas00/ml-engineering, accelerator/benchmarks"
)


@cache
def _builtin() -> dict[str, Hardware]:
    def gpu(
        name: str,
        memory_gb: float,
        bandwidth_gbps: float,
        tflops: dict[str, float],
        sustained_tflops: float,
        processors: int,
        source: str,
        flash: bool = True,
    ) -> Device:
        peak = tflops["fp16"]
        return Device(
            name,
            memory_gb * 1e9,
            bandwidth_gbps * 1e9,
            tuple((k, v * 1e12) for k, v in tflops.items()),
            sustained_tflops / peak,
            processors,
            speed_spread=SPEED_SPREAD,
            flash_attention=flash,
            source=source,
        )

    volta = {"fp32": 15.7, "fp16": 125.0}
    ampere = {"fp32": 19.5, "fp16": 312.0, "bf16": 312.0}
    hopper = {"fp32": 67.0, "fp16": 989.0, "bf16": 989.0, "fp8": 1979.0}
    blackwell = {"fp32": 80.0, "fp16": 2250.0, "bf16": 2250.0, "fp8": 4500.0}
    v100_source = _SPEC + "; sustained 95 TFLOP/s: mli/transformers-benchmarks README, fp16 matmul"
    a100_source = _SPEC + (
        "; sustained 257 TFLOP/s: cuBLAS, normal random 8192^3, thonking.ai, Strangely, Matrix "
        "Multiplications on GPUs Run Faster When Given Predictable Data"
    )
    b200_source = _SPEC + (
        "; sustained 1426.4 TFLOP/s: mean of 8 busy B200, stas00/ml-engineering, "
        "accelerator/benchmarks"
    )
    devices = {
        "v100-32gb": gpu("V100-32GB", 32, 900, volta, 95, 80, v100_source, flash=False),
        "a100-40gb": gpu("A100-40GB", 40, 1555, ampere, 257, 108, a100_source),
        "a100-80gb": gpu("A100-80GB", 80, 2039, ampere, 257, 108, a100_source),
        "h100-80gb": gpu("H100-80GB", 80, 3350, hopper, 698.6, 132, _SPEC + _SUSTAINED_HOPPER),
        "h200-141gb": gpu("H200-141GB", 141, 4800, hopper, 698.6, 132, _SPEC + _SUSTAINED_HOPPER),
        "b200-180gb": gpu("B200-180GB", 180, 8000, blackwell, 1426.4, 148, b200_source),
    }
    network = {
        "v100-32gb": 100,  # DGX-2H: 8 x 100 Gbit/s for 16 GPUs, Shoeybi et al. 2019, section 5
        "a100-40gb": 200,
        "a100-80gb": 200,
        "h100-80gb": 400,
        "h200-141gb": 400,
        "b200-180gb": 400,
    }
    result = {}
    for key, device in devices.items():
        generation = key.split("-")[0]
        share = 0.5 if generation == "v100" else 1.0  # adapters per GPU
        result[key] = Hardware(
            device.name,
            device,
            16 if generation == "v100" else 8,
            _nvlink(generation),
            Link(
                network[key] / 8 * 1e9 * share * NETWORK_FRACTION,
                COLLECTIVE_START_SECONDS,
                NETWORK_HOP_SECONDS,
                source=f"{network[key]} Gbit/s adapters; NVIDIA GTC24 S62129; NCCL tuning.cc",
            ),
        )
    return result


ALIASES = {
    "v100": "v100-32gb",
    "a100": "a100-80gb",
    "h100": "h100-80gb",
    "h200": "h200-141gb",
    "b200": "b200-180gb",
}


def find_hardware(name: str) -> Hardware:
    """Built-in hardware by name, such as "h100-80gb" or "h100".

    Raises:
        ValueError: when there is none of that name; near matches are suggested.
    """
    key = name.lower().replace("_", "-").replace(" ", "-").removesuffix("-sxm")
    key = ALIASES.get(key, key)
    builtin = _builtin()
    if key in builtin:
        return builtin[key]
    near = difflib.get_close_matches(key, [*builtin, *ALIASES], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(builtin)}"
    raise ValueError(
        f"unknown GPU {name!r}: {hint} A file describes other machines: --machine FILE"
    )


def hardware_names() -> list[str]:
    """Names of the built-in hardware."""
    return list(_builtin())


@cache
def _nvlink(generation: str) -> Link:
    """The link inside a node, from measured all-reduce curves (nccl-tests).

    A ring's curve was measured on 8 A100; other generations have its shape at their own peak. From
    Hopper on, all-reduce runs in the switch (NVLS), with curves of its own; gathers and scatters
    remain rings.
    """
    rows = read_table("nccl_busbw")
    ring_peak = {"v100": 122e9, "a100": 235e9, "h100": 365e9, "h200": 365e9, "b200": 680e9}

    def curve(gpu: str, algorithm: str) -> Curve:
        points = {
            _bytes(row["size"]): float(row["busbw_GBps"]) * 1e9
            for row in rows
            if (row["gpu"], row["algo"], row["nodes"], row["gpus"]) == (gpu, algorithm, "1", "8")
            and row["collective"] == "all_reduce"
            and row["size"] != "peak"
        }
        return tuple(sorted(points.items()))

    scale = ring_peak[generation] / ring_peak["a100"]
    ring = tuple((size, speed * scale) for size, speed in curve("A100", ""))
    switch = {"h100": ("H200", "NVLS"), "h200": ("H200", "NVLS"), "b200": ("B200", "default")}
    whole = curve(*switch[generation]) if generation in switch else ring
    return Link(
        ring_peak[generation],
        COLLECTIVE_START_SECONDS,
        NODE_HOP_SECONDS,
        curve=whole,
        split_curve=ring,
        source="nccl-tests, stas00/ml-engineering 744d01e network; peaks NVIDIA GTC24 S62129",
    )


def _bytes(text: str) -> float:
    return float(text[:-1]) * float(1 << {"K": 10, "M": 20, "G": 30}[text[-1]])
