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
    """Date, machine, command, medians and every sample, in seconds, as JSON."""
    report = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "command": command,
        "unit": "seconds",
        "summary": summary,
        "samples": samples,
    }
    Path(path).write_text(json.dumps(report) + "\n", encoding="utf-8")
