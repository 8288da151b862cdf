"""The time of one transformer block and microbatch, with its collectives."""

from __future__ import annotations

from dataclasses import dataclass

from colrow.layers.describe import BlockSpec
from colrow.planner.collective_time import (
    NO_COMMUNICATION,
    CommunicationSeconds,
    collectives,
    cp_seconds,
    ep_seconds,
    tp_seconds,
)
from colrow.planner.compute import block_pass
from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape
from colrow.planner.passes import Pass


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


def block_time(
    model: ModelShape, block: BlockSpec, layout: Layout, hardware: Hardware
) -> BlockTime:
    """One of the model's transformer blocks and one microbatch."""
    key = layout.per_microbatch
    passes, calls = block_pass(block, key, hardware.device), collectives(model, block, key)
    return BlockTime(
        passes,
        tp_seconds(calls.block, calls.columns, "forward", layout, hardware, passes),
        tp_seconds(calls.block, calls.columns, "backward", layout, hardware, passes),
        cp_seconds(block, layout, hardware, "forward", passes.forward.attention),
        cp_seconds(block, layout, hardware, "backward", passes.backward.attention),
        ep_seconds(block, layout, hardware, "forward"),
        ep_seconds(block, layout, hardware, "backward"),
    )
