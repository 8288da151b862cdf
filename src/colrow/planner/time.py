"""The time of a training step, part by part."""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import NormalDist

from colrow.planner.collective_time import (
    NO_COMMUNICATION,
    PROCESSOR_SHARE,
    CommunicationSeconds,
    collectives,
    cp_seconds,
    dp_collective_seconds,
    ep_seconds,
    exposed_seconds,
    stage_seconds,
    tp_seconds,
)
from colrow.planner.compute import Pass, Seconds, block_pass, ends_pass
from colrow.planner.hardware import Device, Hardware
from colrow.planner.layout import Layout
from colrow.planner.memory import StageElements, dense_layers_of_stage, stage_elements
from colrow.planner.model import ModelShape
from colrow.planner.pipeline_time import StageSeconds, bubble_seconds
from colrow.planner.roofline import stream_seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step on the device that the others wait for; the parts add up.

    Attributes:
        matmul: linear layers and the head.
        attention: scores, softmax, weighted sum.
        elementwise: what memory bandwidth limits, gradient accumulation and loss included.
        recompute: what backward computes again.
        launches: waiting for the host, where a layer is computed faster than it is launched.
        stragglers: waiting for the slowest of the devices, which are not equally fast.
        tp_exposed: tensor-parallel collectives that computing waits for.
        cp_exposed: keys and values that attention waits for.
        ep_exposed: tokens on their way to experts and back.
        pp_bubble: waiting for other pipeline stages.
        pp_transfer: handing activations between stages, where that is not hidden.
        dp_exposed: gradient and parameter traffic of data parallelism that is not hidden.
        optimizer: updating the parameters.
    """

    matmul: float
    attention: float
    elementwise: float
    recompute: float
    launches: float
    stragglers: float
    tp_exposed: float
    cp_exposed: float
    ep_exposed: float
    pp_bubble: float
    pp_transfer: float
    dp_exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        """The step."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def computing(self) -> float:
        """Matmuls, attention, elementwise work and recomputation."""
        return self.matmul + self.attention + self.elementwise + self.recompute


@dataclass(frozen=True)
class _Stage:
    """One microbatch on one stage, before the schedule."""

    compute: Seconds
    recompute: float
    tp: CommunicationSeconds
    cp: float
    ep: float
    launches: float
    schedule: StageSeconds


def straggler_share(device: Device, devices: int) -> float:
    """By how much the slowest of so many devices is expected to be slower than the average.

    Devices that wait for each other in every collective run at the pace of the slowest; of n normal
    values the expected largest is about the (n - 3/8) / (n + 1/4) quantile (Blom 1958).
    """
    if devices == 1 or not device.speed_spread:
        return 0.0
    quantile = NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))
    return device.speed_spread * quantile


@dataclass(frozen=True)
class BlockTime:
    """One block and microbatch: computing and its collectives, for tables of single layers."""

    passes: Pass
    tp_forward: CommunicationSeconds
    tp_backward: CommunicationSeconds
    cp_forward: CommunicationSeconds = NO_COMMUNICATION
    cp_backward: CommunicationSeconds = NO_COMMUNICATION
    ep_forward: CommunicationSeconds = NO_COMMUNICATION
    ep_backward: CommunicationSeconds = NO_COMMUNICATION

    @property
    def forward(self) -> float:
        """Forward with exposed collectives, seconds."""
        waits = (self.tp_forward, self.cp_forward, self.ep_forward)
        return self.passes.forward.total + sum(wait.exposed for wait in waits)

    @property
    def backward(self) -> float:
        """Backward with recomputation and exposed collectives, seconds."""
        waits = (self.tp_backward, self.cp_backward, self.ep_backward)
        computing = self.passes.backward.total + self.passes.recompute.total
        return computing + sum(wait.exposed for wait in waits)


def block_time(model: ModelShape, layout: Layout, hardware: Hardware) -> BlockTime:
    """One transformer block and microbatch."""
    key = layout.per_microbatch
    passes = block_pass(model, key, hardware.device)
    calls = collectives(model, key).block
    return BlockTime(
        passes,
        tp_seconds(calls, "forward", layout, hardware, passes),
        tp_seconds(calls, "backward", layout, hardware, passes),
        cp_seconds(model, layout, hardware, "forward", passes.forward.attention),
        cp_seconds(model, layout, hardware, "backward", passes.backward.attention),
        ep_seconds(model, layout, hardware, "forward"),
        ep_seconds(model, layout, hardware, "backward"),
    )


def step_time(model: ModelShape, layout: Layout, hardware: Hardware) -> StepTime:
    """Time of one optimiser step, by part."""
    stages = _stages(model, layout, hardware)
    slowest = max(stages, key=lambda stage: stage.schedule.total)
    count = layout.num_microbatches
    work = slowest.compute * count
    transfer = _transfer(model, layout, hardware)
    return StepTime(
        matmul=work.matmul,
        attention=work.attention,
        elementwise=work.elementwise,
        recompute=slowest.recompute * count,
        launches=slowest.launches * count,
        stragglers=straggler_share(hardware.device, layout.devices)
        * (work.total + slowest.recompute * count),
        tp_exposed=slowest.tp.exposed * count,
        cp_exposed=slowest.cp * count,
        ep_exposed=slowest.ep * count,
        pp_bubble=bubble_seconds(layout, [stage.schedule for stage in stages]),
        pp_transfer=transfer,
        dp_exposed=_dp_exposed(model, layout, hardware, slowest.schedule),
        optimizer=_optimizer(model, layout, hardware),
    )


def stage_schedule(model: ModelShape, layout: Layout, hardware: Hardware) -> list[StageSeconds]:
    """One microbatch's forward and backward on each stage, with what they wait for."""
    return [stage.schedule for stage in _stages(model, layout, hardware)]


def tp_total_seconds(model: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Time of all tensor-parallel collectives of a step on one device, hidden or not."""
    slowest = max(_stages(model, layout, hardware), key=lambda stage: stage.schedule.total)
    return slowest.tp.total * layout.num_microbatches


def _stages(model: ModelShape, layout: Layout, hardware: Hardware) -> list[_Stage]:
    key = layout.per_microbatch
    block = block_time(model, layout, hardware)
    embedding, head = ends_pass(model, key, hardware.device)
    calls = collectives(model, key)
    first, last = (
        BlockTime(
            passes,
            tp_seconds(group, "forward", layout, hardware, passes),
            tp_seconds(group, "backward", layout, hardware, passes),
        )
        for passes, group in ((embedding, calls.embedding), (head, calls.head))
    )
    stages = []
    for index, layers in enumerate(layout.layers_of_stage(model)):
        without = dense_layers_of_stage(model, index, layers)
        parts = [(block, layers - without)]
        if without:
            parts.append((block_time(model.dense_part, layout, hardware), without))
        if index == 0:
            parts.append((first, 1))
        if index == layout.pp - 1:
            parts.append((last, 1))
        compute, tp = Seconds(), CommunicationSeconds()
        recompute = forward_seconds = backward_seconds = cp = ep = 0.0
        for part, layers_or_ends in parts:
            times = layers_or_ends * (hardware.block_factor or 1.0)
            compute += (part.passes.forward + part.passes.backward) * times
            recompute += part.passes.recompute.total * times
            both = part.tp_forward + part.tp_backward
            tp += CommunicationSeconds(both.total * times, both.exposed * times)
            cp += (part.cp_forward.exposed + part.cp_backward.exposed) * times
            ep += (part.ep_forward.exposed + part.ep_backward.exposed) * times
            forward_seconds += part.forward * times
            backward_seconds += part.backward * times
        ends = (index == 0) + (index == layout.pp - 1)
        forward_wait, backward_wait = _waiting_for_host(
            layout, hardware.device, layers, ends / 2, forward_seconds, backward_seconds
        )
        schedule = StageSeconds(
            forward_seconds + forward_wait,
            backward_seconds + backward_wait,
            compute.weight_gradients,
        )
        waiting = forward_wait + backward_wait
        stages.append(_Stage(compute, recompute, tp, cp, ep, waiting, schedule))
    return stages


def _waiting_for_host(
    layout: Layout,
    device: Device,
    layers: int,
    ends: float,
    forward: float,
    backward: float,
) -> tuple[float, float]:
    """How much longer a microbatch's forward and backward take to launch than to compute.

    The host runs ahead of the device, so what counts is a whole stage's pass. Where device and host
    are one there is nothing to wait for.
    """
    if device.on_host:
        return 0.0, 0.0
    program, again = layout.program, layout.recompute == "full"
    each, outside = program.host_layer_seconds * layers, program.host_ends_seconds * ends / 2
    return (
        max(0.0, each + outside - forward),
        max(0.0, each * (2 if again else 1) + outside - backward),
    )


def _transfer(model: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Activations and their gradients between stages.

    Filling and draining the pipeline passes every boundary once each way, always exposed. In
    between, every chunk of every microbatch is received and sent once per direction.
    """
    if layout.pp == 1:
        return 0.0
    once = stage_seconds(model, layout, hardware)
    steady = 2 * (layout.num_microbatches - 1) * layout.virtual_stages * once
    exposed = PROCESSOR_SHARE if layout.program.p2p_overlap else 1.0
    return 2 * (layout.pp - 1) * once + exposed * steady


def _stage_parameters(model: ModelShape, layout: Layout) -> StageElements:
    """Parameters of the fullest rank of the fullest stage."""
    stages = layout.layers_of_stage(model)
    return max(
        (
            stage_elements(model, layout, stage, layers, rank)
            for stage, layers in {0: stages[0], layout.pp - 1: stages[-1]}.items()
            | {stages.index(max(stages)): max(stages)}.items()
            for rank in range(layout.tp)
        ),
        key=lambda elements: elements.total,
    )


def _dp_exposed(
    model: ModelShape, layout: Layout, hardware: Hardware, stage: StageSeconds
) -> float:
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

    def exposed(traffic: float, room: float) -> float:
        return exposed_seconds(traffic, room) if layout.program.dp_overlap else traffic

    if layout.zero == 0:
        return exposed(seconds("all_reduce", layout.gradient_bytes), stage.backward)
    scatter = seconds("reduce_scatter", layout.gradient_bytes)
    gather = seconds("all_gather", layout.itemsize)
    if layout.zero == 3:
        each = exposed(gather, stage.forward) + exposed(gather + scatter, stage.backward)
        return count * each
    scatters = count if layout.zero == 2 else 1
    return scatters * exposed(scatter, stage.backward) + exposed(gather, stage.forward)


def _optimizer(model: ModelShape, layout: Layout, hardware: Hardware) -> float:
    """Gradients are read for their norm, read for the update and cleared; states read and written.

    Weights are written, and read where there is no master copy.
    """
    if layout.optimizer == "none":
        return 0.0
    elements = _stage_parameters(model, layout)
    parameters = elements.over_replicas(layout) if layout.zero else float(elements.total)
    weights = layout.itemsize * (1 if layout.has_master_weights else 2)
    each = 3 * layout.gradient_bytes + 2 * layout.state_bytes + weights
    return stream_seconds(hardware.device, parameters * each)
