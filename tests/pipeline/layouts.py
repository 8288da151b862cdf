"""Pipelines of many shapes on the ranks of the test pool, and steps of training in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.pipeline.limits import ZERO_BUBBLE, split_for
from colrow.pipeline.runner import PipelineRunner
from colrow.pipeline.schedules import Schedule
from colrow.sharding import Sharding
from colrow.train.batches import Order, Windows
from colrow.train.optimizer import adamw
from colrow.train.parallel import parallelize
from colrow.train.starting_model import set_dropout
from colrow.train.step import Stepper
from colrow.train.tokens import TokenFile
from tests.train.layouts import CLIP, CONFIG

LAYERS = 4
SEQUENCE, GLOBAL_BATCH = 17, 8
TIED = {**CONFIG, "num_hidden_layers": LAYERS}
UNTIED = {**TIED, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Pipe:
    """A way to run a training step through a pipeline."""

    pp: int = 2
    tp: int = 1
    dp: int = 1
    schedule: Schedule = "1f1b"
    split: str | None = None
    stages_per_rank: int = 0
    tensor_split: str = ""
    sequence_parallel: bool = False
    fsdp: bool = False
    microbatch: int = 2
    tied: bool = True
    layers: int = LAYERS
    dropout: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    recompute: str = "none"

    @property
    def ranks(self) -> int:
        return self.pp * self.tp * self.dp

    @property
    def microbatches(self) -> int:
        return GLOBAL_BATCH // (self.dp * self.microbatch)

    @property
    def config(self) -> dict[str, Any]:
        return {**(TIED if self.tied else UNTIED), "num_hidden_layers": self.layers}

    def __str__(self) -> str:
        parts = [f"pp{self.pp}", self.schedule]
        parts += [f"tp{self.tp}"] if self.tp > 1 else []
        parts += [f"dp{self.dp}"] if self.dp > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += ["fsdp"] if self.fsdp else []
        parts += [] if self.tied else ["untied"]
        parts += [f"{self.stages_per_rank}-stages"] if self.stages_per_rank else []
        parts += [f"shares-{self.tensor_split}"] if self.tensor_split else []
        return "-".join([*parts, self.split] if self.split else parts)


def make_mesh(world: ParallelGroup | None, pipe: Pipe) -> Mesh:
    """The grid on the first ranks of the pool, whose ``world`` it is; None for fresh processes."""
    if world is None or pipe.ranks == 4:
        return colrow.init_mesh(pp=pipe.pp, tp=pipe.tp, dp=pipe.dp, device="cpu")
    assert pipe.ranks == pipe.pp, "the pool's other sizes have one dimension"
    assert pipe.pp == 2 or not pipe.tied, "a group of the ends needs all ranks of the pool"
    one, pp = ParallelGroup.single, ParallelGroup(world.group, world.rank, world.size, "pp")
    return Mesh(one(), one("dp"), pp, None, torch.device("cpu"), ends=pp if pp.size == 2 else None)


def make_one(pipe: Pipe, tokens: Path) -> Stepper:
    """The same training in one process."""
    model = colrow.from_config(pipe.config, dtype=torch.float64).train()
    if pipe.dropout:
        set_dropout(model, pipe.dropout)
    mesh = colrow.init_mesh(device="cpu")
    return Stepper(
        model,
        parallelize(model, mesh, label_smoothing=pipe.label_smoothing, z_loss=pipe.z_loss),
        adamw(model),
        mesh,
        _order(tokens),
        microbatch=pipe.microbatch,
        global_batch=GLOBAL_BATCH,
        clip=CLIP,
    )


def _order(tokens: Path) -> Order:
    return Order(Windows.of(TokenFile.open(tokens), SEQUENCE), seed=1)


def make_stepper(
    mesh: Mesh,
    pipe: Pipe,
    tokens: Path,
    *,
    dtype: torch.dtype = torch.float64,
    compute_dtype: torch.dtype | None = None,
) -> Stepper:
    """A model, an optimiser and an order of the text, as tests.train.layouts makes them."""
    config = colrow.from_config(pipe.config, device="meta").config
    model = colrow.from_config(
        pipe.config,
        mesh,
        dtype=dtype,
        sequence_parallel=pipe.sequence_parallel,
        sharding=Sharding(overlap=pipe.schedule not in ZERO_BUBBLE),
        layer_split=split_for(config, pipe.pp, pipe.schedule, pipe.split, pipe.stages_per_rank),
        tensor_split=pipe.tensor_split,
    ).train()
    if pipe.dropout:
        set_dropout(model, pipe.dropout)
    runner = PipelineRunner(
        model,
        mesh,
        pipe.schedule,
        microbatches=pipe.microbatches,
        microbatch=pipe.microbatch,
        sequence=SEQUENCE,
        fsdp=pipe.fsdp,
        compute_dtype=compute_dtype,
        recompute=pipe.recompute,  # type: ignore[arg-type]
        label_smoothing=pipe.label_smoothing,
        z_loss=pipe.z_loss,
    )
    return Stepper(
        model,
        runner,
        adamw(model),
        mesh,
        _order(tokens),
        microbatch=pipe.microbatch,
        global_batch=GLOBAL_BATCH,
        clip=CLIP,
    )
