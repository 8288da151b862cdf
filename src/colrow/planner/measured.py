"""Hardware as it was measured where the plan is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from colrow.planner.block_time import block_time
from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.machine_file import machine_from_mapping
from colrow.planner.model import ModelShape


def measured_hardware(
    model: ModelShape, machine: Mapping[str, object], block: Layout, block_seconds: float
) -> Hardware:
    """The machine as measured, with the factor by which its blocks differ from their prediction.

    Args:
        model: of which the first block was measured.
        machine: the keys of a machine file.
        block: the measured block's layout.
        block_seconds: that its forward and backward took.

    Raises:
        ValueError: when the measured times contradict each other.
    """
    hardware = machine_from_mapping(machine, default_name="this machine")
    predicted = block_time(model, model.config.blocks[0], block, hardware)
    factor = block_seconds / (predicted.forward + predicted.backward)
    return replace(hardware, block_factor=factor)
