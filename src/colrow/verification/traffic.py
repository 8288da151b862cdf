"""The collectives of one training step, predicted and recorded side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record, summarize
from colrow.inplace.describe import plain_tokens
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.models.interface import Kind, TensorParallelModel


@dataclass(frozen=True)
class Traffic:
    """One step's collectives on one rank.

    Attributes:
        kind: of the model.
        unknown: why nothing is predicted; "" where it is.
        predicted, recorded: rows of ``op``, ``phase``, ``layer``, ``bytes`` (of one call),
            ``dtype``, ``group``, ``count``, sorted.
        seconds, exposed_seconds: of all recorded calls, from issue to completion and without what
            computing hid; None where nothing was really sent.
    """

    kind: Kind
    unknown: str
    predicted: list[dict[str, object]]
    recorded: list[dict[str, object]]
    seconds: float | None
    exposed_seconds: float | None

    @property
    def equal(self) -> bool | None:
        """Whether the prediction holds call for call and byte for byte; None without one."""
        return None if self.unknown else self.predicted == self.recorded

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "unknown": self.unknown,
            "predicted": self.predicted,
            "recorded": self.recorded,
            "equal": self.equal,
            "seconds": self.seconds,
            "exposed_seconds": self.exposed_seconds,
        }


def record_step(model: TensorParallelModel, *, batch: int, sequence: int) -> Traffic:
    """Runs ``model.loss(...).backward()`` on some tokens and compares with the prediction.

    Works on meta tensors too. Every rank of the model's group must call it.
    """
    tp, device = model.tp, model.device
    prediction = model.predicted_calls(batch, sequence)
    ids = plain_tokens(model.description.vocab_size, batch * sequence, device).view(batch, sequence)
    with record(tp) as ledger:
        model.loss(ids, ids).backward()
    real = device.type != "meta"
    return Traffic(
        model.description.kind,
        prediction.unknown,
        summarize(prediction.calls),
        summarize(ledger.calls),
        ledger.seconds() if real else None,
        ledger.seconds(exposed=True) if real else None,
    )


def dry_run(
    config: ModelConfig,
    tp_size: int,
    *,
    batch: int,
    sequence: int,
    sequence_parallel: bool = False,
    tensor_split: str | Sequence[float] | None = None,
    keep_gathered_input: bool = True,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
) -> Traffic:
    """As :func:`record_step` for one rank of any model and any tp size, without memory or peers.

    The real layers run on meta tensors, over a process group that only pretends.
    """
    with _pretended_group(rank, tp_size) as tp:
        model = Decoder(
            config,
            tp,
            sequence_parallel=sequence_parallel,
            tensor_split=tensor_split,
            keep_gathered_input=keep_gathered_input,
            device="meta",
            dtype=dtype,
        )
        return record_step(model, batch=batch, sequence=sequence)


@contextmanager
def _pretended_group(rank: int, size: int) -> Iterator[ParallelGroup]:
    if size == 1:
        yield ParallelGroup.single()
        return
    if dist.is_initialized():
        raise ValueError("a dry run needs a process without a process group of its own")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield ParallelGroup(dist.group.WORLD, rank, size)
    finally:
        dist.destroy_process_group()
