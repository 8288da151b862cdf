"""The file that a measurement leaves behind."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch


def write_report(
    path: str, command: str, summary: Mapping[str, object], samples: Mapping[str, object]
) -> None:
    """Date, machine, command, medians and every sample, in seconds, to four digits, as JSON."""
    report = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "command": command,
        "unit": "seconds",
        "summary": summary,
        "samples": _rounded(samples),
    }
    Path(path).write_text(json.dumps(report) + "\n", encoding="utf-8")


def _rounded(samples: object) -> object:
    if isinstance(samples, Mapping):
        return {name: _rounded(inner) for name, inner in samples.items()}
    if isinstance(samples, list):
        return [_rounded(inner) for inner in samples]
    return float(f"{samples:.3e}") if isinstance(samples, float) else samples
