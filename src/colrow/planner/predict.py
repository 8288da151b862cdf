"""The planner's answer for one layout: memory, communication and time, with their parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

from colrow.comm.ledger import Call
from colrow.layers.describe import Division
from colrow.models.config import ModelConfig
from colrow.planner.catalog import find_model
from colrow.planner.collective_time import tp_calls
from colrow.planner.hardware import Hardware, find_hardware
from colrow.planner.interval import Interval, alike, step_interval
from colrow.planner.layout import Layout
from colrow.planner.memory import Memory, training_memory
from colrow.planner.model import ModelShape
from colrow.planner.pipeline_time import check_schedule
from colrow.planner.time import StepTime, step_time


@dataclass(frozen=True)
class Prediction:
    """What one training layout costs.

    Attributes:
        model, layout, hardware: what was asked.
        memory: of every pipeline stage and tensor-parallel rank.
        time: of one optimiser step, by part.
    """

    model: ModelShape
    layout: Layout
    hardware: Hardware
    memory: Memory
    time: StepTime

    @property
    def step_seconds(self) -> float:
        """Time of one optimiser step."""
        return self.time.total

    @cached_property
    def interval(self) -> Interval:
        """Where four of five measured step times are expected; its middle is what to count on."""
        return step_interval(self.time, self.layout, self.hardware)

    def is_as_fast_as(self, other: Prediction) -> bool:
        """Whether these two layouts of one model cannot be told apart."""
        mine, others = (self.time, self.layout), (other.time, other.layout)
        return alike(mine, others, self.hardware)

    @property
    def memory_bytes_per_rank(self) -> float:
        """Memory of the fullest rank; ``memory.ranks`` has every one."""
        return self.memory.fullest.total

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory is enough."""
        return self.memory_bytes_per_rank <= self.hardware.device.memory_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.layout.batch * self.layout.sequence / self.step_seconds

    @property
    def model_flops(self) -> float:
        """FLOPs of a step as the model needs them, without recomputation.

        Forward 2 per multiply-add, backward twice forward: 6 per parameter of a linear layer and
        token, and 12 s h per layer and token for attention (Narayanan et al. 2021, appendix;
        Korthikanti et al. 2022, eq. 7), which counts both halves of the causal scores; where a
        window is shorter than the sequence, its length counts.
        """
        config, length = self.model.config, self.layout.sequence
        multiplied = config.vocab_size * config.hidden_size
        for block, count in self.model.kinds.items():
            attention = block.attention
            sizes = attention.num_heads * (attention.key_size + attention.value_size)
            multiplied += count * min(attention.window or length, length) * sizes
            for linear in block.linears(Division(1), 0):
                multiplied += count * linear.active * linear.inputs * linear.outputs
        return 6.0 * self.layout.batch * length * multiplied

    @property
    def flops_per_device(self) -> float:
        """Achieved model FLOP/s of one device."""
        return self.model_flops / self.step_seconds / self.layout.devices

    @property
    def utilization(self) -> float:
        """Model FLOPs utilisation (MFU): achieved over peak."""
        return self.flops_per_device / self.hardware.device.flops(self.layout.precision)

    @cached_property
    def tp_calls(self) -> list[Call]:
        """Every tensor-parallel collective of one microbatch on one rank, as the ledger records."""
        return tp_calls(self.model, self.layout)

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        memory = self.memory.fullest
        return {
            "model": self.model.name,
            "parameters": self.model.parameters,
            "active_parameters": self.model.active_parameters,
            "hardware": self.hardware.name,
            "devices": self.layout.devices,
            "layout": asdict(self.layout) | {"global_batch": self.layout.batch},
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "step_seconds_interval_80": [self.interval.low, self.interval.high],
            "step_breakdown_seconds": asdict(self.time),
            "memory_bytes_per_rank": self.memory_bytes_per_rank,
            "memory_breakdown_bytes": asdict(memory),
            "memory_bytes_by_stage": [max(r.total for r in stage) for stage in self.memory.ranks],
            "device_memory_bytes": self.hardware.device.memory_bytes,
            "tokens_per_second": self.tokens_per_second,
            "model_flops_utilization": self.utilization,
        }


def predict(
    model: ModelShape | ModelConfig | str, layout: Layout, hardware: Hardware | str
) -> Prediction:
    """Memory and time of a training layout.

    Args:
        model: a shape, a decoder's configuration, or the name of a built-in model.
        layout: sizes, batch, formats and schedule.
        hardware: a description, or the name of built-in hardware.

    Raises:
        ValueError: for names that are unknown, and for a layout that cannot run: more ranks than
            heads, more stages than layers, a sequence beyond the model's positions.
    """
    if isinstance(model, str):
        model = find_model(model)
    elif isinstance(model, ModelConfig):
        model = ModelShape(model.family, model)
    if isinstance(hardware, str):
        hardware = find_hardware(hardware)
    check_layout(model, layout, hardware)
    return Prediction(
        model,
        layout,
        hardware,
        training_memory(model, layout, hardware),
        step_time(model, layout, hardware),
    )


def check_layout(model: ModelShape, layout: Layout, hardware: Hardware) -> None:
    """Raises ValueError where the layout cannot run."""
    config = model.config
    if config.longest is not None and layout.sequence > config.longest:
        raise ValueError(
            f"a sequence of {layout.sequence} is longer than the {config.longest} learned "
            f"positions of {model.name}"
        )
    if layout.ep > 1:
        if model.experts == 1:
            raise ValueError(f"ep={layout.ep}: {model.name} has no experts to divide")
        if model.experts % layout.ep:
            raise ValueError(
                f"ep={layout.ep} does not divide the {model.experts} experts of {model.name}"
            )
        if layout.replicas % layout.ep:
            raise ValueError(
                f"ep={layout.ep} must divide dp x cp = {layout.replicas}: experts are divided over "
                "these ranks"
            )
    if layout.offload_layers and not hardware.device.host_bandwidth:
        raise ValueError(
            f"offload_layers={layout.offload_layers}: how fast {hardware.device.name} sends to its "
            "host is not known; a machine file can say it as host_gigabytes_per_second"
        )
    hardware.device.flops(layout.precision)
    model.division(layout.tp, layout.tp_weights)
    layout.layers_of_stage(model)
    check_schedule(layout)
