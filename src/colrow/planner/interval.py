"""How far a predicted step time can be off, and whether two layouts can be told apart. No torch.

The logarithm of measured over predicted time is taken to be normal. Its spread is that of a step's
parts, weighted with their shares: computing is known well, collectives that computing waits for
less so, and a network that other jobs use hardly. The numbers are fitted to the rows of
``benchmarks/planner`` and checked there: about 80 % of the rows lie inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.placement import place
from colrow.planner.time import StepTime

# Steps take this much longer than predicted on average, for what is not modelled: reading data,
# logging, the optimiser's own launches.
BIAS = 0.045
# Standard deviations of the logarithm, for a step that consists of this part alone.
EVERYTHING = 0.05
# Where a block of the model was measured on this machine: how much medians of blocks and steps of
# one machine differ from run to run (benchmarks/README.md: four runs within 8 %).
MEASURED = 0.03
INSIDE_NODES = 0.40
BETWEEN_NODES = 0.50
LAUNCHES = 0.15
BUBBLE = 0.20
# On a network without trees (EFA in a shared cluster), per doubling of the number of nodes.
SHARED_BIAS, SHARED, SHARED_MOST = 0.30, 0.45, 1.1
# What two layouts of one model on one machine do not have in common, beside their parts.
PAIR = 0.02
# 80 % of a normal distribution lie within so many standard deviations.
Z80 = 1.2816


@dataclass(frozen=True)
class Interval:
    """Where four of five measured step times lie, in seconds.

    Attributes:
        low, high: the interval's ends.
        middle: as many are above as below; longer than the prediction by what is not modelled.
    """

    low: float
    middle: float
    high: float


def step_interval(time: StepTime, layout: Layout, hardware: Hardware) -> Interval:
    """The 80 % interval of one step."""
    measured = hardware.block_factor is not None
    everything, bias = (MEASURED, 0.0) if measured else (EVERYTHING, BIAS)
    deviation = math.hypot(everything, *_deviations(time, layout, hardware).values())
    doublings = _shared_doublings(layout, hardware)
    if doublings:
        bias += SHARED_BIAS * doublings
        deviation = math.hypot(deviation, min(SHARED * doublings, SHARED_MOST))
    middle = time.total * math.exp(bias)
    reach = math.exp(Z80 * deviation)
    return Interval(middle / reach, middle, middle * reach)


def alike(
    first: tuple[StepTime, Layout], second: tuple[StepTime, Layout], hardware: Hardware
) -> bool:
    """Whether the prediction cannot tell which of two layouts of one model is faster.

    What they have in common, such as the speed of matmuls, is equally wrong for both; only parts
    of which they have different shares count.
    """
    (time, layout), (other_time, other_layout) = first, second
    one = _deviations(time, layout, hardware)
    two = _deviations(other_time, other_layout, hardware)
    deviation = math.hypot(PAIR, *(one[name] - two[name] for name in one))
    return abs(math.log(time.total / other_time.total)) < Z80 * deviation


def _deviations(time: StepTime, layout: Layout, hardware: Hardware) -> dict[str, float]:
    """Standard deviations of the logarithm by part, each with its share of the step."""
    inside = time.tp_exposed if place("tp", layout, hardware).nodes == 1 else 0.0
    between = time.tp_exposed - inside + time.dp_exposed + time.pp_transfer
    between += time.cp_exposed + time.ep_exposed
    if layout.devices <= hardware.devices_per_node:
        inside, between = inside + between, 0.0
    return {
        "inside": INSIDE_NODES * inside / time.total,
        "between": BETWEEN_NODES * between / time.total,
        "launches": LAUNCHES * time.launches / time.total,
        "bubble": BUBBLE * time.pp_bubble / time.total,
    }


def _shared_doublings(layout: Layout, hardware: Hardware) -> float:
    """How often the nodes doubled from one, where the network is shared; else 0."""
    nodes = math.ceil(layout.devices / hardware.devices_per_node)
    return 0.0 if hardware.network.trees else math.log2(nodes)
