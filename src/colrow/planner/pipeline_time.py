"""Pipeline schedules: how long devices idle, and how many microbatches' activations they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colrow.planner.layout import Layout


@dataclass(frozen=True)
class StageSeconds:
    """One microbatch on one stage, everything that the stage waits for included.

    Attributes:
        forward, backward: of all the stage's layers.
        weight_gradients: the part of ``backward`` that zero-bubble schedules can postpone.
    """

    forward: float
    backward: float
    weight_gradients: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def bubble_seconds(layout: Layout, stages: Sequence[StageSeconds]) -> float:
    """Time of a step in which the slowest device has nothing to do.

    With equal stages of t seconds: (p-1) t for GPipe (Huang et al. 2019, section 2.3) and 1F1B
    (Narayanan et al. 2021, section 2.2.1); (p-1) t / v interleaved (section 2.2.2);
    (p-1) (F + B - W) and (p-1) (F + B - 2W) for ZB-H1 and ZB-H2, B being the input gradient and W
    the weight gradient (Qi et al. 2024, arXiv 2401.10241, Table 2).
    """
    if layout.pp == 1:
        return 0.0
    slowest = max(stages, key=lambda stage: stage.total)
    others = list(stages)
    others.remove(slowest)
    if layout.schedule == "interleaved":
        return sum(stage.total for stage in others) / layout.virtual_stages
    postponed = {"zb-h1": 2, "zb-h2": 3}.get(layout.schedule, 0)
    return sum(max(0.0, s.total - postponed * s.weight_gradients) for s in others)


def layers_in_flight(layout: Layout, stage: int, layers: int) -> float:
    """For how many (layer, microbatch) pairs a stage keeps activations at its fullest moment.

    GPipe: all microbatches. 1F1B and ZB-H1: as many microbatches as there are stages from here on.
    Interleaved: for the first stage L (1 + (p-1)/(p v)) layers (Korthikanti et al. 2022, section
    4.2.3); in general Megatron-LM's warm-up of 2 (p-1-i) + (v-1) p chunks, and one. ZB-H2: about
    twice 1F1B's (Qi et al. 2024, section 2.2).
    """
    microbatches, rest = layout.num_microbatches, layout.pp - stage
    if layout.schedule == "gpipe":
        return float(microbatches * layers)
    if layout.schedule == "interleaved":
        chunks = 2 * (rest - 1) + (layout.virtual_stages - 1) * layout.pp + 1
        per_chunk = layers / layout.virtual_stages
        return min(chunks, microbatches * layout.virtual_stages) * per_chunk
    deepest = 2 * rest - 1 if layout.schedule == "zb-h2" else rest
    return float(min(deepest, microbatches) * layers)


def microbatches_in_flight(layout: Layout, stage: int) -> int:
    """How many microbatches a stage has begun and not finished, at most."""
    return int(-(-layers_in_flight(layout, stage, layout.virtual_stages) // layout.virtual_stages))


def check_schedule(layout: Layout) -> None:
    """Raises ValueError where a schedule cannot run with this many microbatches."""
    if layout.schedule == "interleaved" and layout.num_microbatches % layout.pp:
        raise ValueError(
            f"the interleaved schedule needs a number of microbatches that is a multiple of "
            f"pp={layout.pp}, got {layout.num_microbatches} (global_batch / (dp x microbatch))"
        )
