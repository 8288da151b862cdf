"""What was measured, as plain values. Plain Python, no torch."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

from colrow.models.config import ModelConfig

What = Literal["layer", "attention", "mlp", "block", "model"]
WHAT: tuple[What, ...] = ("layer", "attention", "mlp", "block", "model")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        config: the model, or the model whose block or layers are measured; None for one that is
            split in place.
        what: "layer" is each linear layer of a block alone.
        batch, sequence: of the input. When decoding, ``sequence`` tokens are cached already.
        decode: one new token at a time, without gradients, rather than forward and backward.
        tensor_split: the ranks' shares of every tensor, for the tp sizes above 1; None for equal
            ones.
        sequence_parallel, dtype ("float32", ...): of the layers.
        runs: how many are timed; medians are taken over them.
        warmup: runs before these.
        threads: of each rank; None leaves what the launcher set, the cores divided by the ranks.
        device: as :func:`colrow.init_mesh` takes it.
        engine: as :func:`colrow.init_mesh` takes it.
        in_place: directory or ``config.json`` of the model of transformers that is split in place;
            "" for one that the decoder computes.
    """

    config: ModelConfig | None
    what: What
    batch: int
    sequence: int
    decode: bool = False
    sequence_parallel: bool = False
    tensor_split: str | None = None
    dtype: str = "float32"
    runs: int = 10
    warmup: int = 2
    threads: int | None = None
    device: str | None = None
    engine: str | None = None
    in_place: str = ""

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise ValueError(f"what={self.what!r}: one of {', '.join(WHAT)}")
        for name, least in (("batch", 1), ("sequence", 2), ("runs", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} is needed")
        if self.decode and self.sequence_parallel:
            raise ValueError(
                "sequence_parallel divides a sequence, and decoding has one token at a time: "
                "leave one of the two out"
            )

    def tensor_split_of(self, tp: int) -> str | None:
        """The tensor split of one of the sizes that are measured: one process has none."""
        return self.tensor_split if tp > 1 else None


@dataclass(frozen=True)
class PhaseTime:
    """One phase of a run on one rank, in seconds per run (per token where the phase decodes).

    Attributes:
        phase: "forward", "backward", "optimizer", "prompt" or "token".
        seconds: median of ``runs``, with nothing attached that measures.
        matmul, attention: in these kernels; backward's matmuls of unfused attention count as
            matmul.
        exposed: communication: this rank only waited, for bytes or for a rank that came late.
        hidden: communication that was under way while this rank computed; no part of ``seconds``.
        calls: how often each kind of work was called: "matmul", "attention", and collectives by
            their operation.
        runs: each run's seconds.
        profiled_seconds: median with the profiler attached, to judge how much that disturbs.
    """

    phase: str
    seconds: float
    matmul: float
    attention: float
    exposed: float
    hidden: float
    calls: dict[str, float]
    runs: list[float]
    profiled_seconds: float

    @property
    def rest(self) -> float:
        """Element-wise work, norms, copies, Python: what is left of ``seconds``.

        The parts come from other runs than the total, so on a busy machine it may be below 0.
        """
        return self.seconds - self.matmul - self.attention - self.exposed

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rest": self.rest}


@dataclass(frozen=True)
class Measurement:
    """One subject at one tensor-parallel size.

    Attributes:
        subject: "model", "block", "mlp", "attention", or a linear layer's name.
        tp: ranks.
        threads: of each rank.
        engine: what carried the bytes, None for one rank.
        device: "cpu", or the GPU's name.
        tokens: that one run works on, in its decisive phases.
        ranks: each rank's phases, by rank.
    """

    subject: str
    tp: int
    threads: int
    engine: str | None
    device: str
    tokens: int
    ranks: list[list[PhaseTime]]

    @property
    def slowest(self) -> list[PhaseTime]:
        """The phases of the rank that takes longest."""
        return max(self.ranks, key=lambda phases: sum(p.seconds for p in phases))

    @property
    def seconds(self) -> float:
        """Of a run: all phases of the slowest rank, but for generation the token alone."""
        return sum(p.seconds for p in self.slowest if p.phase != "prompt")

    @property
    def tokens_per_second(self) -> float:
        """``tokens`` over ``seconds``."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "subject": self.subject,
            "tp": self.tp,
            "threads_per_rank": self.threads,
            "engine": self.engine,
            "device": self.device,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "ranks": [[phase.as_dict() for phase in phases] for phases in self.ranks],
        }


def speedups(measurements: list[Measurement]) -> dict[tuple[str, int], float]:
    """By subject and tp: how many times as fast as one process; only where that was measured."""
    alone = {m.subject: m.seconds for m in measurements if m.tp == 1}
    return {
        (m.subject, m.tp): alone[m.subject] / m.seconds for m in measurements if m.subject in alone
    }


def median(values: list[float]) -> float:
    """0 for no values."""
    return statistics.median(values) if values else 0.0
