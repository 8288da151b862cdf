"""What a device computes, holds and sends: the built-in GPUs and their nodes.

A gigabyte is 10^9 bytes throughout.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cache

from colrow.planner.data import read_table
from colrow.planner.links import Link
from colrow.planner.node_links import efa_link, network_link, node_link

Precision = str  # "fp32", "fp16", "bf16" or "fp8"

# A fused attention kernel's rate as a share of the large matmul's: causal, 128 per head, 2-4k
# tokens on A100 give about 180 and 150 of 257 TFLOP/s (read off Dao 2023, arXiv 2307.08691,
# figures 5 and 6).
FLASH_FORWARD = 0.70
FLASH_BACKWARD = 0.60
# Experts' matmuls in one kernel: median of 12 shapes 64.7 % of A100's peak, where single large ones
# reach 71.8 % (MooreThreads/SimuMax 4dcaae5, configs/system/a100_pcie.json).
GROUPED_SHARE = 0.90
# 8-bit matmuls reach less of their peak than 16-bit ones; the best shapes on H100 70.9 and 80.3 %
# (stas00/ml-engineering 744d01e, compute/accelerator, MAMF). Devices.csv has the ratio of others.
FP8_SHARE = 0.709 / 0.803


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
        fp8_share: of that fraction, what 8-bit matmuls reach of their peak.
        processors: multiprocessors (SMs) over which the tiles of a matmul are spread; 0 where they
            are not known, which switches the tile model off.
        grouped_share: rate of experts' matmuls in one kernel, as a share of a single large one's.
        on_host: a rank of a CPU host: nothing is launched to it and no context takes its memory.
        stream_fraction: share of ``memory_bandwidth`` that an elementwise kernel reaches.
        kernel_seconds: a kernel's launch and ramp, during which it does no work.
        speed_spread: standard deviation of the speed of devices of this kind, as a fraction.
        flash_attention: whether a fused attention kernel exists for it.
        flash_forward, flash_backward: that kernel's rate as a share of the large matmul's.
        flash2_forward, flash2_backward: the same for FlashAttention-2, where newer kernels exist.
        matmul_curve: measured ``(FLOPs of a matmul, FLOP/s)``, ascending, for devices that are
            described by measurements rather than by tiles; empty otherwise.
        watts: at full load, from the data sheet; 0 where unknown.
        host_bandwidth: bytes per second to the host's memory, and as many back; 0 where unknown.
        source: where the numbers come from, and what is assumed.
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
    flash_forward: float = FLASH_FORWARD
    flash_backward: float = FLASH_BACKWARD
    flash2_forward: float = FLASH_FORWARD
    flash2_backward: float = FLASH_BACKWARD
    matmul_curve: tuple[tuple[float, float], ...] = ()
    grouped_share: float = GROUPED_SHARE
    fp8_share: float = FP8_SHARE
    on_host: bool = False
    watts: float = 0.0
    host_bandwidth: float = 0.0
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
        block_factor: a block of the model as it was measured here, over its prediction; times of
            blocks are multiplied by it. None where no block was measured.
    """

    name: str
    device: Device
    devices_per_node: int
    link: Link
    network: Link
    block_factor: float | None = None

    def __post_init__(self) -> None:
        if self.devices_per_node < 1:
            raise ValueError(f"devices_per_node={self.devices_per_node}: must be at least 1")

    def with_devices_per_node(self, count: int) -> Hardware:
        """The same devices in nodes of another size."""
        return replace(self, devices_per_node=count)


# devices.csv: what copies to the host reach is taken as 80 % of the data sheets of PCIe 3, 4 and 5
# (15.8, 31.5 and 63 GB/s), and a little under half of the 450 GB/s that a Grace host has for two
# GPUs. The speed of equal devices spreads by 1.05 %. Sustained matmul rates of 40 H200 lie
# within 4.5 % of each other (stas00/ml-engineering, accelerator/benchmarks); the range of 40 normal
# values is 4.3 standard deviations.


@cache
def _builtin() -> dict[str, Hardware]:
    result = {}
    for row in read_table("devices"):
        hardware = _from_row(row)
        result[row["key"]] = hardware
        if float(row["adapters_per_device"]) == 1:
            efa = efa_link(hardware.network, hardware.link)
            name = f"{hardware.name} on EFA"
            result[f"{row['key']}-efa"] = replace(hardware, name=name, network=efa)
    return result


def _from_row(row: dict[str, str]) -> Hardware:
    """A line of devices.csv: TFLOP/s per precision, GB and GB/s."""
    peaks = {name: float(row[name]) for name in ("fp32", "fp16", "bf16", "fp8", "fp4") if row[name]}
    assumed = f"; assumed: {row['assumed']}" if row["assumed"] else ""
    forward = float(row["flash_forward"] or FLASH_FORWARD)
    backward = float(row["flash_backward"] or FLASH_BACKWARD)
    device = Device(
        row["name"],
        float(row["memory_gb"]) * 1e9,
        float(row["memory_gb_per_s"]) * 1e9,
        tuple((name, peak * 1e12) for name, peak in peaks.items()),
        float(row["sustained"]) / peaks["fp16"],
        int(row["processors"]),
        fp8_share=float(row["fp8_share"] or FP8_SHARE),
        stream_fraction=float(row["stream_fraction"] or Device.stream_fraction),
        speed_spread=float(row["speed_spread"]),
        flash_attention=row["flash_forward"] != "0",
        flash_forward=forward,
        flash_backward=backward,
        flash2_forward=float(row["flash2_forward"] or forward),
        flash2_backward=float(row["flash2_backward"] or backward),
        watts=float(row["watts"]),
        host_bandwidth=float(row["host_gb_per_s"]) * 1e9,
        source=row["source"] + assumed,
    )
    network = network_link(float(row["adapter_gbit_per_s"]), float(row["adapters_per_device"]))
    link = node_link(row["link"], float(row["link_gb_per_s"]) * 1e9)
    return Hardware(row["name"], device, int(row["devices_per_node"]), link, network)


ALIASES = {
    "v100": "v100-32gb",
    "a100": "a100-80gb",
    "h100": "h100-80gb",
    "h200": "h200-141gb",
    "b200": "b200-180gb",
    "b300": "b300-288gb",
    "gb200": "gb200-186gb",
    "gb300": "gb300-288gb",
    "mi300x": "mi300x-192gb",
    "mi355x": "mi355x-288gb",
    "l40s": "l40s-48gb",
    "l4": "l4-24gb",
    "a10g": "a10g-24gb",
    "a6000": "rtx-a6000-48gb",
    "3090": "rtx-3090-24gb",
    "4090": "rtx-4090-24gb",
    "5090": "rtx-5090-32gb",
    "rtx-a6000": "rtx-a6000-48gb",
    "rtx-3090": "rtx-3090-24gb",
    "rtx-4090": "rtx-4090-24gb",
    "rtx-5090": "rtx-5090-32gb",
}


def find_hardware(name: str) -> Hardware:
    """Built-in hardware by name, such as "h100-80gb" or "h100".

    Raises:
        ValueError: when there is none of that name; near matches are suggested.
    """
    key = name.lower().replace("_", "-").replace(" ", "-").removesuffix("-sxm")
    device = key.removesuffix("-efa")
    key = ALIASES.get(device, device) + key[len(device) :]
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
