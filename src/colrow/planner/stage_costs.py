"""How long blocks, embedding and head take, by the planner: to balance stages. No torch."""

from __future__ import annotations

from colrow.models.config import ModelConfig
from colrow.models.stages import Costs, layer_costs
from colrow.planner.compute import block_pass, ends_pass
from colrow.planner.hardware import find_hardware
from colrow.planner.layout import DTYPE, Layout
from colrow.planner.model import ModelShape
from colrow.planner.passes import Pass

_ANY_GPU = "h100"  # the proportions hardly depend on which


def planned_costs(
    config: ModelConfig, *, tp: int, microbatch: int, sequence: int, precision: str
) -> Costs:
    """Seconds of one microbatch, forward and backward; in fp64, which no plan knows, operations.

    Where blocks differ, their mean counts.

    Args:
        precision: "fp32", "bf16", "fp16" or "fp64".
    """
    if precision not in DTYPE:
        return layer_costs(config, sequence)
    model, device = ModelShape("", config), find_hardware(_ANY_GPU).device
    layout = Layout(
        tp=tp, microbatch=microbatch, sequence=sequence, precision=precision
    ).per_microbatch
    block = sum(
        _seconds(block_pass(kind, layout, device)) * (count / config.num_layers)
        for kind, count in model.kinds.items()
    )
    first, last = (_seconds(end) for end in ends_pass(model, layout, device))
    return Costs(first, block, last)


def _seconds(passes: Pass) -> float:
    return (passes.forward + passes.backward).total
