"""How far a predicted step time can be off, and whether two layouts can be told apart. No torch.

The logarithm of measured over predicted time is taken to be normal. Its spread is that of a step's
parts, weighted with their shares: computing is known well, collectives that computing waits for
less so, and a network that other jobs use hardly. ``python -m benchmarks.planner.spread`` fits the
numbers to published rows and checks them on families of tables that were left out of the fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from colrow.planner.hardware import Hardware
from colrow.planner.layout import Layout
from colrow.planner.placement import job_nodes
from colrow.planner.time import StepTime

# 80 % of a normal distribution lie within so many standard deviations.
Z80 = 1.2816


@dataclass(frozen=True)
class Spread:
    """How measured times scatter round predictions: standard deviations of the logarithm.

    Attributes:
        bias: steps take this much longer than predicted, for what is not modelled: reading data,
            logging, the optimiser's own launches.
        everything: of a step in which nothing waits.
        collectives: of a step that consists of collectives alone.
        launches: of one that waits for the host alone.
        bubble: of one that waits for other stages alone.
        shared: on a shared network, for each doubling of the nodes, towards longer times alone.
    """

    bias: float
    everything: float
    collectives: float
    launches: float
    bubble: float
    shared: float


SPREAD = Spread(
    bias=0.044,
    everything=0.10,
    collectives=0.27,
    launches=0.022,
    bubble=0.22,
    shared=0.22,
)
# Where a block of the model was measured on this machine: how much medians of blocks and steps of
# one machine differ from run to run (benchmarks/README.md: four runs within 8 %).
MEASURED = 0.03
# What two layouts of one model on one machine do not have in common, beside their parts.
PAIR = 0.02


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


@dataclass(frozen=True)
class Waits:
    """Shares of a step in which computing waits.

    Attributes:
        collectives: for other ranks' data.
        launches: for the host.
        bubble: for other stages.
        doublings: how often the nodes doubled from one, on a shared network; else 0.
    """

    collectives: float
    launches: float
    bubble: float
    doublings: float

    @classmethod
    def of(cls, time: StepTime, layout: Layout, hardware: Hardware) -> Waits:
        """Those of a predicted step."""
        sent = time.tp_exposed + time.dp_exposed + time.pp_transfer
        sent += time.cp_exposed + time.ep_exposed
        nodes = job_nodes(layout, hardware)
        return cls(
            sent / time.total,
            time.launches / time.total,
            time.pp_bubble / time.total,
            math.log2(nodes) if hardware.network.is_shared else 0.0,
        )

    def deviations(self, spread: Spread) -> tuple[float, ...]:
        """Standard deviations of the logarithm by part."""
        return (
            spread.collectives * self.collectives,
            spread.launches * self.launches,
            spread.bubble * self.bubble,
        )

    def factors(self, spread: Spread) -> tuple[float, float, float]:
        """Low end, middle and high end over the prediction."""
        deviation = math.hypot(spread.everything, *self.deviations(spread))
        above = math.hypot(deviation, spread.shared * self.doublings)
        middle = math.exp(spread.bias)
        return middle * math.exp(-Z80 * deviation), middle, middle * math.exp(Z80 * above)


def step_interval(time: StepTime, layout: Layout, hardware: Hardware) -> Interval:
    """The 80 % interval of one step."""
    measured = hardware.block_factor is not None
    spread = replace(SPREAD, everything=MEASURED, bias=0.0) if measured else SPREAD
    low, middle, high = Waits.of(time, layout, hardware).factors(spread)
    return Interval(time.total * low, time.total * middle, time.total * high)


def alike(
    first: tuple[StepTime, Layout], second: tuple[StepTime, Layout], hardware: Hardware
) -> bool:
    """Whether the prediction cannot tell which of two layouts of one model is faster.

    What they have in common, such as the speed of matmuls, is equally wrong for both; only parts
    of which they have different shares count.
    """
    (time, layout), (other_time, other_layout) = first, second
    one = Waits.of(time, layout, hardware).deviations(SPREAD)
    two = Waits.of(other_time, other_layout, hardware).deviations(SPREAD)
    deviation = math.hypot(PAIR, *(a - b for a, b in zip(one, two, strict=True)))
    return abs(math.log(time.total / other_time.total)) < Z80 * deviation
