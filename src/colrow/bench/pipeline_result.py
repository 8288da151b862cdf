"""A measured pipeline, as plain values. Plain Python, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from colrow.models.config import ModelConfig
from colrow.models.stages import LayerSplit
from colrow.pipeline.limits import check_schedule, split_for
from colrow.pipeline.schedules import Schedule, expected_bubble_fraction
from colrow.pipeline.timeline import Timeline
from colrow.planner.stage_costs import planned_costs

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class PipelineSettings:
    """What to measure.

    Attributes:
        config: the model.
        pp, tp: ranks of the pipeline, and of each of its stages.
        schedule: see :data:`colrow.pipeline.schedules.SCHEDULES`.
        microbatches: of a step.
        batch, sequence: of a microbatch.
        layer_split: layers or shares of the ranks, such as "3,1"; "" balances them.
        stages_per_rank: 0 for as many as the schedule needs at least.
        tensor_split: the tp ranks' shares of every tensor, such as "2,1"; "" for equal ones.
        sequence_parallel, dtype ("float32", ...): of the layers.
        runs: steps that are recorded; the one of median length is shown.
        warmup: steps before these.
        threads: of each rank; None leaves what the launcher set.
        device, engine: as :func:`colrow.init_mesh` takes them.

    Raises:
        ValueError: for what the schedule or the model does not allow.
    """

    config: ModelConfig
    pp: int
    tp: int = 1
    schedule: Schedule = "1f1b"
    microbatches: int = 8
    batch: int = 1
    sequence: int = 128
    layer_split: str = ""
    stages_per_rank: int = 0
    tensor_split: str = ""
    sequence_parallel: bool = False
    dtype: str = "float32"
    runs: int = 10
    warmup: int = 2
    threads: int | None = None
    device: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        if self.sequence < 2:
            raise ValueError(f"sequence={self.sequence}: at least 2 is needed")
        if self.pp < 2:
            raise ValueError(f"pp={self.pp}: a pipeline has at least 2 ranks")
        check_schedule(self.schedule, self.split, self.microbatches)

    @property
    def split(self) -> LayerSplit:
        """Which layers are where; balanced as ``colrow train`` does it."""
        costs = planned_costs(
            self.config,
            tp=self.tp,
            microbatch=self.batch,
            sequence=self.sequence,
            precision=_PRECISIONS[self.dtype],
        )
        return split_for(
            self.config, self.pp, self.schedule, self.layer_split, self.stages_per_rank, costs
        )

    @property
    def expected_bubble_fraction(self) -> float | None:
        """For stages whose parts cost the same; None where the microbatches do not fill the
        pipeline."""
        try:
            return expected_bubble_fraction(
                self.schedule, self.pp, self.microbatches, chunks=self.split.stages_per_rank
            )
        except ValueError:
            return None


@dataclass(frozen=True)
class PipelineMeasurement:
    """What was measured on the ranks of one pipeline, those of tp rank 0.

    Attributes:
        step: the recorded step of median length.
        runs: seconds of every recorded step.
        kept_bytes: by rank, the most bytes of activations that autograd kept at once.
        sent_messages, sent_bytes: by rank, in a step.
        threads: of each rank.
        engine: what carried the messages.
        device: "cpu", or the GPU's name.
    """

    step: Timeline
    runs: list[float]
    kept_bytes: list[int]
    sent_messages: list[int]
    sent_bytes: list[int]
    threads: int
    engine: str
    device: str

    def as_dict(self, settings: PipelineSettings) -> dict[str, Any]:
        """For JSON."""
        mine = {k: v for k, v in vars(self).items() if k != "step"}
        return {
            "settings": {**asdict(settings), "layers": list(settings.split.sizes)},
            "expected_bubble_fraction": settings.expected_bubble_fraction,
            "step": self.step.as_dict(),
            "ideal": self.step.ideal().as_dict(),
            **mine,
        }
