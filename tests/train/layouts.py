"""Meshes of many shapes on the ranks of the test pool, and training on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.inplace.observe.modes import exact_arithmetic
from colrow.models.decoder import Decoder
from colrow.train.batches import Order, Windows
from colrow.train.optimizer import adamw
from colrow.train.parallel import parallelize
from colrow.train.step import Stepper
from colrow.train.tokens import TokenFile
from colrow.verification.reference import quiet_transformers

STEPS, RATE, CLIP = 3, 1e-2, 0.5


@dataclass(frozen=True)
class Layout:
    """A way to divide a training run."""

    tp: int = 1
    dp: int = 1
    fsdp: bool = False
    sequence_parallel: bool = False
    tensor_split: str = ""

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    def __str__(self) -> str:
        parts = [f"tp{self.tp}"] if self.tp > 1 or self.dp == 1 else []
        parts += [f"dp{self.dp}"] if self.dp > 1 else []
        parts += ["fsdp"] if self.fsdp else []
        parts += [f"split{self.tensor_split}"] if self.tensor_split else []
        return "-".join([*parts, "sp"] if self.sequence_parallel else parts)


LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=3),
    Layout(tp=4, sequence_parallel=True),
    Layout(dp=2),
    Layout(dp=2, fsdp=True),
    Layout(tp=2, dp=2, sequence_parallel=True),
    Layout(tp=2, dp=2, fsdp=True),
    Layout(tp=2, dp=2, fsdp=True, sequence_parallel=True),
]

# As tests.train.curves.CONFIG, with 5 query heads (2 + 1 + 1 + 1 on four ranks) and biases.
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 257,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "intermediate_size": 53,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}


def make_mesh(world: ParallelGroup, layout: Layout) -> Mesh:
    """The grid on the first ranks of the pool; ``world`` is what the pool gives a test."""
    one, device = ParallelGroup.single, torch.get_default_device()
    if layout.tp > 1 and layout.dp > 1:
        return colrow.init_mesh(tp=layout.tp, dp=layout.dp, device="cpu")
    if layout.dp > 1:
        assert world.group is not None
        grid = DeviceMesh.from_group(world.group, "cpu", mesh_dim_names=("dp",))
        dp = ParallelGroup(world.group, world.rank, world.size, "dp")
        return Mesh(one(), dp, one("pp"), grid, device)
    return Mesh(world, one("dp"), one("pp"), None, device)


def make_stepper(
    mesh: Mesh,
    layout: Layout,
    tokens: Path,
    *,
    config: dict[str, Any] = CONFIG,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    microbatch: int = 0,
    clip: float = 1.0,
    **options: Any,
) -> Stepper:
    """A model, an optimiser and an order of the text, ready for steps of 8 sequences of 17.

    Args:
        microbatch: sequences; by default so many that every rank adds up two microbatches.
    """
    model: Decoder = colrow.from_config(
        config,
        mesh,
        seed=seed,
        dtype=dtype,
        sequence_parallel=layout.sequence_parallel,
        tensor_split=layout.tensor_split,
    ).train()
    loss = parallelize(model, mesh, fsdp=layout.fsdp, **options)
    return Stepper(
        model,
        loss,
        adamw(model),
        mesh,
        Order(Windows.of(TokenFile.open(tokens), 17), seed=1),
        microbatch=microbatch or 4 // layout.dp,
        global_batch=8,
        clip=clip,
    )


def reference(
    tokens: Path,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    *,
    config: dict[str, Any] = CONFIG,
    steps: int = STEPS,
    **_: Any,
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """The same steps by transformers' model, torch's loss, clipping and optimiser."""
    return _reference(tokens, label_smoothing, z_loss, json.dumps(config), steps)


@cache
def _reference(
    tokens: Path, label_smoothing: float, z_loss: float, config_text: str, steps: int
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    config = json.loads(config_text)
    initial = colrow.full_state_dict(colrow.from_config(config, seed=0, dtype=torch.float64))
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        keys = {name: value for name, value in config.items() if name != "model_type"}
        theirs = AutoConfig.for_model(config["model_type"], **keys)
        model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float64)
        model.load_state_dict(initial, strict=False)
    found = torch_loop(model, tokens, steps, label_smoothing, z_loss)
    names = initial.keys()
    return found, {n: p.detach() for n, p in model.state_dict().items() if n in names}


def torch_loop(
    model: Any,
    tokens: Path,
    steps: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> list[tuple[float, float]]:
    """Trains a model of transformers in fp64; each step's loss and gradient norm.

    Args:
        optimizers: by default AdamW, with weight decay for matrices.
    """
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adamw_alone = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    order, found = Order(Windows.of(TokenFile.open(tokens), 17), seed=1), []
    for step in range(steps):
        ids, labels = order.batch(step * 8, 8)
        with exact_arithmetic():
            answer = model(input_ids=ids)
        logits = answer.logits[:, :-1]
        targets = labels[:, 1:]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing
        )
        loss = loss + z_loss * torch.logsumexp(logits, -1).square()[targets != -100].mean()
        if getattr(answer, "aux_loss", None) is not None:
            loss = loss + model.config.router_aux_loss_coef * answer.aux_loss
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers or [adamw_alone]:
            optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def config_file(directory: Path) -> Path:
    """The configuration as a file."""
    path = directory / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path
