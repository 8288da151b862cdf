"""What was measured where, as JSON with every sample and as tables for people."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.peers.report import summary


def environment(device: torch.device) -> dict[str, object]:
    """Device, driver, versions and date."""
    found: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """All tables."""
    where, ceiling = report["environment"], report["ceiling"]
    lines = [
        "# One rank on its GPU",
        "",
        f"{where['device']}, driver {where.get('driver', '-')}, torch {where['torch']}, "
        f"{where['date']}; `{report['command']}`. Medians of {report['turns']} alternating samples "
        "and their quartiles, in milliseconds; the L2 cache is "
        f"{'emptied' if report['l2_flushed'] else 'not emptied'} before each sample. Nothing is "
        "sent: the other ranks are not there.",
        "",
        f"Ceilings: {ceiling['matmul_teraflops']:.4g} TFLOP/s in the fastest {report['dtype']} "
        f"matmul, {ceiling['memory_gigabytes_per_second']:.4g} GB/s in a copy, read and written "
        "bytes counted.",
        "",
    ]
    for block in report.get("blocks", ()):
        lines += [f"**A block of {block['share']}**, forward {block['forward_flops']:.3g} FLOP", ""]
        rows = [
            [
                name,
                *_phase(one, "forward"),
                _share_of(one, "forward"),
                *_phase(one, "backward"),
                _share_of(one, "backward"),
                _gigabytes(one),
            ]
            for name, one in block["contestants"].items()
        ]
        head = ["", "forward", "quartiles", "of ceiling", "backward", "quartiles", "of ceiling"]
        lines += [*_table([*head, "peak GB"], rows), ""]
    for loss in report.get("loss", ()):
        lines += [f"**Cross entropy of {loss['tokens']} x {loss['vocabulary']} logits**", ""]
        rows = [
            [name, *_phase(one, "forward"), *_phase(one, "backward"), _gigabytes(one)]
            for name, one in loss["contestants"].items()
        ]
        head = ["", "forward", "quartiles", "backward", "quartiles", "peak GB beside the logits"]
        lines += [*_table(head, rows), ""]
    for one in report.get("decoding", ()):
        lines += [
            f"**A token of {one['share']}**, batch {one['batch']}, {one['cached']} cached; reading "
            f"the weights takes {1e3 * one['seconds_to_read_weights']:.3g} ms",
            "",
        ]
        rows = [[name, *_phase(found, "token")] for name, found in one["contestants"].items()]
        lines += [*_table(["", "token", "quartiles"], rows), ""]
    return "\n".join(lines)


def _phase(one: Mapping[str, Any], phase: str) -> list[str]:
    if one.get("problem"):
        return [f"not timed: {one['problem']}", "-"]
    found = summary(one[phase]["seconds"])
    low, high = 1e3 * found["quartile_low"], 1e3 * found["quartile_high"]
    return [f"{1e3 * found['median']:.4g}", f"{low:.4g} - {high:.4g}"]


def _share_of(one: Mapping[str, Any], phase: str) -> str:
    return "-" if phase not in one else f"{100 * one[phase]['fraction_of_ceiling']:.1f} %"


def _gigabytes(one: Mapping[str, Any]) -> str:
    return "-" if one.get("peak_bytes") is None else f"{one['peak_bytes'] / 1e9:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _driver() -> str:
    """As nvidia-smi says it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip().splitlines()[0]
