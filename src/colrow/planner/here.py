"""Hardware as it was measured where the plan is made."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.machine_file import machine_from_mapping
from colrow.planner.model import ModelShape
from colrow.planner.time import block_time

if TYPE_CHECKING:
    from colrow.bench.here import Here


def measured_hardware(model: ModelShape, found: Here, block: Layout) -> Hardware:
    """The machine as measured, with the factor by which its blocks differ from their prediction.

    Args:
        model: of which the first block was measured.
        found: the measurement.
        block: the measured block's layout.

    Raises:
        ValueError: when the measured times contradict each other.
    """
    hardware = machine_from_mapping(found.machine, default_name="this machine")
    predicted = block_time(model, model.config.blocks[0], block, hardware)
    factor = found.block_seconds / (predicted.forward + predicted.backward)
    return replace(hardware, block_factor=factor)
