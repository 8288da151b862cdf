"""Which pipelines are possible: stages of each schedule, refusals with a reason. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from colrow.models.config import ModelConfig
from colrow.models.stages import Costs, LayerSplit
from colrow.pipeline.schedules import SCHEDULES, Schedule

ZERO_BUBBLE: tuple[Schedule, ...] = ("zero-bubble", "zbv")
_SEVERAL: tuple[Schedule, ...] = ("interleaved", "zbv")  # stages on a rank


def schedule_named(name: str) -> Schedule:
    """Raises ValueError for another name than those of :data:`SCHEDULES`."""
    for schedule in SCHEDULES:
        if schedule == name:
            return schedule
    raise ValueError(f"schedule={name!r}: must be one of {', '.join(SCHEDULES)}")


def split_for(
    config: ModelConfig,
    ranks: int,
    schedule: Schedule,
    layer_split: str | Sequence[float] | None = None,
    stages_per_rank: int = 0,
    costs: Costs | None = None,
) -> LayerSplit:
    """The stages that a schedule needs.

    Args:
        ranks: pipeline-parallel size.
        layer_split, costs: as for :meth:`LayerSplit.create`.
        stages_per_rank: 0 for the fewest that the schedule takes. On one rank there is one stage.

    Raises:
        ValueError: stages that do not go with the schedule or the model.
    """
    single = schedule in ("gpipe", "1f1b")
    count = stages_per_rank or (2 if schedule in _SEVERAL else 1)
    if ranks == 1 and not single:
        count = 1
    elif single and count != 1:
        raise ValueError(
            f"schedule={schedule} has one stage on each rank, not {count}: use interleaved or "
            "zero-bubble for several"
        )
    elif schedule == "interleaved" and count < 2:
        raise ValueError("schedule=interleaved needs at least 2 stages on each rank; use 1f1b")
    elif schedule == "zbv" and count != 2:
        raise ValueError(f"schedule=zbv has two stages on each rank, not {count}")
    return LayerSplit.create(
        config,
        ranks,
        layer_split or None,
        stages_per_rank=count,
        v_shaped=schedule == "zbv" and ranks > 1,
        costs=costs,
    )


def check_schedule(
    schedule: Schedule,
    split: LayerSplit,
    microbatches: int,
    *,
    recompute: str = "none",
    fsdp: bool = False,
    tied: bool = False,
) -> None:
    """Refuses what cannot run, with the reason.

    Args:
        microbatches: of a data-parallel rank's step.
        recompute, fsdp: as in :func:`colrow.train.parallel.parallelize`; ``fsdp`` only where there
            is something to divide.
        tied: the embedding is the head.

    Raises:
        ValueError: always before any work.
    """
    stages, ranks = len(split.sizes), split.ranks
    if ranks == 1:
        return
    if schedule == "1f1b" and microbatches < stages:
        raise ValueError(
            f"schedule=1f1b fills its {stages} stages with at least as many microbatches, and a "
            f"step has {microbatches}: use more (a larger global batch or a smaller microbatch), "
            "or gpipe"
        )
    rounds = max(1, microbatches // ranks)
    if schedule in ("interleaved", "zero-bubble") and microbatches % rounds:
        raise ValueError(
            f"schedule={schedule} goes in {rounds} equal rounds over {ranks} ranks, and "
            f"{microbatches} microbatches do not divide into them: use a multiple of {ranks}"
        )
    if schedule in ZERO_BUBBLE and recompute != "none":
        raise ValueError(
            f"schedule={schedule} goes backward in two parts, and recomputation would run each "
            "block, with what it sends, for both: use recompute=none, or 1f1b or interleaved"
        )
    if schedule in ZERO_BUBBLE and fsdp:
        raise ValueError(
            f"schedule={schedule} computes weight gradients apart from the rest, where FSDP2 does "
            "not see them: use it without fsdp, or 1f1b or interleaved"
        )
    if fsdp and tied and split.last_rank == 0:
        raise ValueError(
            "FSDP2 divides each parameter in one module, and here a tied embedding is in two "
            "stages of one rank: use another schedule than zbv, or no fsdp"
        )
