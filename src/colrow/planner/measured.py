"""Hardware as it was measured where the plan is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.machine_file import machine_from_mapping
from colrow.planner.model import ModelShape
from colrow.planner.time import block_time


def measured_hardware(
    model: ModelShape, machine: Mapping[str, object], block: Layout, block_seconds: float
) -> Hardware:
    """The machine as measured, with the factor by which its blocks differ from their prediction.

    Args:
        model: of which a block was measured.
        machine: the keys of a machine file.
        block: the measured block's layout.
        block_seconds: that its forward and backward took.

    Raises:
        ValueError: when the measured times contradict each other.
    """
    hardware = machine_from_mapping(machine, default_name="this machine")
    predicted = block_time(model, block, hardware)
    factor = block_seconds / (predicted.forward + predicted.backward)
    return replace(hardware, block_factor=factor)
