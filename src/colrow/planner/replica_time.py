"""The time of what replicas do together once a step: reducing gradients, updating parameters."""

from __future__ import annotations

from colrow.planner.collective_time import dp_collective_seconds, exposed_seconds
from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.memory import ranks_alike
from colrow.planner.model import ModelShape
from colrow.planner.pipeline_time import StageSeconds
from colrow.planner.roofline import stream_seconds
from colrow.planner.stage_elements import StageElements, stage_elements


def _stage_parameters(model: ModelShape, layout: Layout) -> StageElements:
    """Parameters of the fullest rank of the fullest stage."""
    return max(
        (
            stage_elements(model, layout, stage, kinds, rank)
            for stage, kinds in enumerate(layout.kinds_of_stages(model))
            for rank in set(ranks_alike(model, layout.division))
        ),
        key=lambda elements: elements.total,
    )


def dp_exposed(model: ModelShape, layout: Layout, hardware: Hardware, stage: StageSeconds) -> float:
    """Data-parallel traffic that computing waits for.

    Gradients can be reduced while the last microbatch's backward runs; with ZeRO-1 the updated
    parameters are gathered while the next step's first forward runs; ZeRO-2 scatters gradients
    after every microbatch, ZeRO-3 also gathers parameters for every forward and backward.
    """
    if layout.replicas == 1:
        return 0.0
    elements = _stage_parameters(model, layout)
    count = layout.num_microbatches

    # ZeRO-3 gathers and scatters block by block.
    pieces = max(layout.layers_of_stage(model)) if layout.zero == 3 else 1

    def seconds(op: str, each: float) -> float:
        """Of a collective over all parameters, ``each`` bytes of a parameter."""
        dense, experts = (n * each / pieces for n in (elements.dense, elements.experts))
        among_all = dp_collective_seconds(op, dense, layout, hardware)
        return pieces * (
            among_all + dp_collective_seconds(op, experts, layout, hardware, experts=True)
        )

    overlaps = layout.program.dp_overlap and (layout.zero == 0 or layout.program.zero_overlap)

    def exposed(traffic: float, room: float) -> float:
        return exposed_seconds(traffic, room) if overlaps else traffic

    if layout.zero == 0:
        return exposed(seconds("all_reduce", layout.gradient_bytes), stage.backward)
    scatter = seconds("reduce_scatter", layout.gradient_bytes)
    gather = seconds("all_gather", layout.itemsize)
    if layout.zero == 3:
        each = exposed(gather, stage.forward) + exposed(gather + scatter, stage.backward)
        return count * each
    scatters = count if layout.zero == 2 else 1
    return scatters * exposed(scatter, stage.backward) + exposed(gather, stage.forward)


def optimizer_seconds(model: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Gradients are read for their norm, read for the update and cleared; states read and written.

    Weights are written, and read where there is no master copy.
    """
    if layout.optimizer == "none":
        return 0.0
    elements = _stage_parameters(model, layout)
    parameters = elements.over_replicas(layout) if layout.zero else float(elements.total)
    weights = layout.itemsize * (1 if layout.has_master_weights else 2)
    each = 3 * layout.gradient_bytes + 2 * layout.state_bytes + weights
    if layout.precision == "fp8" and layout.program.fused_narrowing:
        each += 2 * layout.itemsize + 2  # read twice, written as it is and transposed
    return stream_seconds(hardware.device, parameters * each)
