"""The time of a training step, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist

from colrow.layers.describe import BlockSpec
from colrow.planner.block_time import BlockTime, block_time
from colrow.planner.collective_time import (
    PROCESSOR_SHARE,
    CommunicationSeconds,
    collectives,
    stage_seconds,
    tp_seconds,
)
from colrow.planner.compute import ends_pass
from colrow.planner.hardware import Device, Hardware
from colrow.planner.layout import Layout
from colrow.planner.memory import microbatch_bytes
from colrow.planner.model import ModelShape, fullest_rank
from colrow.planner.passes import Seconds
from colrow.planner.pipeline_time import StageSeconds, bubble_seconds
from colrow.planner.placement import place
from colrow.planner.replica_time import dp_exposed, optimizer_seconds


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
        offload: copies of activations to the host's memory and back that nothing hides.
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
    offload: float
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
    offload: float
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
        dp_exposed=dp_exposed(model, layout, hardware, slowest.schedule),
        offload=slowest.offload * count,
        optimizer=optimizer_seconds(model, layout, hardware),
    )


def stage_schedule(model: ModelShape, layout: Layout, hardware: Hardware) -> list[StageSeconds]:
    """One microbatch's forward and backward on each stage, with what they wait for."""
    return [stage.schedule for stage in _stages(model, layout, hardware)]


def _stages(model: ModelShape, layout: Layout, hardware: Hardware) -> list[_Stage]:
    key = layout.per_microbatch
    blocks = {block: block_time(model, block, layout, hardware) for block in model.kinds}
    embedding, head = ends_pass(model, key, hardware.device)
    calls = collectives(model, model.usual_block, key)
    first, last = (
        BlockTime(
            passes,
            tp_seconds(group, calls.columns, "forward", layout, hardware, passes),
            tp_seconds(group, calls.columns, "backward", layout, hardware, passes),
        )
        for passes, group in ((embedding, calls.embedding), (head, calls.head))
    )
    stages = []
    for index, kinds in enumerate(layout.kinds_of_stages(model)):
        parts = [(blocks[block], count) for block, count in kinds.items()]
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
            layout, hardware, sum(kinds.values()), ends / 2, forward_seconds, backward_seconds
        )
        forward_seconds += forward_wait
        backward_seconds += backward_wait
        copying = _copy_seconds(model, layout, hardware, kinds)
        forward_copy = max(0.0, copying - forward_seconds)
        backward_copy = max(0.0, copying - backward_seconds)
        schedule = StageSeconds(
            forward_seconds + forward_copy,
            backward_seconds + backward_copy,
            compute.weight_gradients,
        )
        waiting, copying = forward_wait + backward_wait, forward_copy + backward_copy
        stages.append(_Stage(compute, recompute, tp, cp, ep, waiting, copying, schedule))
    return stages


def _waiting_for_host(
    layout: Layout,
    hardware: Hardware,
    layers: int,
    ends: float,
    forward: float,
    backward: float,
) -> tuple[float, float]:
    """How much longer a microbatch's forward and backward take to launch than to compute.

    The host runs ahead of the device, so what counts is a whole stage's pass. Where device and host
    are one there is nothing to wait for.
    """
    if hardware.device.on_host:
        return 0.0, 0.0
    program, again = layout.program, layout.recompute == "full"
    each, outside = program.host_layer_seconds, program.host_ends_seconds * ends / 2
    if hardware.network.is_shared and place("pp", layout, hardware).boundaries:
        each += program.host_stall_seconds * layout.tp
    each *= layers
    return (
        max(0.0, each + outside - forward),
        max(0.0, each * (2 if again else 1) + outside - backward),
    )


def _copy_seconds(
    model: ModelShape, layout: Layout, hardware: Hardware, kinds: Mapping[BlockSpec, int]
) -> float:
    """What a microbatch keeps of the offloaded layers of a stage, sent to the host once."""
    layers = sum(kinds.values())
    if not layout.offload_layers or not layers:
        return 0.0
    key, flash = layout.per_microbatch, hardware.device.flash_attention
    kept = sum(
        microbatch_bytes(model, block, key, fullest_rank(block, layout.division), flash).block
        * count
        for block, count in kinds.items()
    )
    return kept * min(layout.offload_layers, layers) / layers / hardware.device.host_bandwidth


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
