"""How long blocks, embedding and head take, by the planner: to balance stages. No torch."""

from __future__ import annotations

from colrow.models.config import ModelConfig
from colrow.models.stages import Costs, layer_costs
from colrow.planner.compute import block_pass, ends_pass
from colrow.planner.hardware import find_hardware
from colrow.planner.layout import DTYPE, Layout
from colrow.planner.model import ModelShape

_ANY_GPU = "h100"  # the proportions hardly depend on which


def planned_costs(
    config: ModelConfig, *, tp: int, microbatch: int, sequence: int, precision: str
) -> Costs:
    """Seconds of one microbatch, forward and backward; in fp64, which no plan knows, operations.

    Args:
        precision: "fp32", "bf16", "fp16" or "fp64".
    """
    if precision not in DTYPE:
        return layer_costs(config, sequence)
    model, device = ModelShape("", config), find_hardware(_ANY_GPU).device
    layout = Layout(
        tp=tp, microbatch=microbatch, sequence=sequence, precision=precision
    ).per_microbatch
    block = block_pass(model, layout, device)
    first, last = ends_pass(model, layout, device)
    return Costs(*((part.forward + part.backward).total for part in (first, block, last)))
