"""Small models of several families and their steps with an optimiser, split and whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.train.parallel import parallelize
from colrow.verification.reference import precision, quiet_transformers
from tests.train.layouts import CONFIG, Layout, make_mesh

STEPS = 3
Optimizers = list[torch.optim.Optimizer]
Make = Callable[[nn.Module, bool], Optimizers]  # for a model, split or whole

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": CONFIG,  # 5 query heads on 1 KV head, biases, tied
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 37,
        "n_positions": 32,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_neox": {
        **_SMALL,
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "rotary_pct": 0.5,
        "tie_word_embeddings": False,
    },
    "phi3": {
        **_SMALL,
        "model_type": "phi3",
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        **_SMALL,
        "model_type": "mixtral",
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "experts_implementation": "eager",
        "tie_word_embeddings": False,
    },
}


def batch() -> Tensor:
    return (torch.arange(4 * 12) * 7919 % 61).view(4, 12)


def of_transformers(name: str) -> nn.Module:
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        keys = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
        config = AutoConfig.for_model(CONFIGS[name]["model_type"], **keys)
        torch.manual_seed(5)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):  # zeros would hide a mistake
            values = torch.arange(parameter.numel(), dtype=torch.float64).mul(1.7 + number).sin()
            parameter.copy_(parameter + 0.05 * values.view_as(parameter))
    return model


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those of blocks, and all other parameters."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = any(part in name for part in ("blocks.", "layers.", ".h."))
        (matrices if inside and parameter.dim() == 2 else others).append(parameter)
    return matrices, others


def muon(model: nn.Module, split: bool) -> Optimizers:
    matrices, others = hidden_matrices(model)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    first: torch.optim.Optimizer = (
        colrow.Muon(matrices, model, **options) if split else torch.optim.Muon(matrices, **options)
    )
    return [first, torch.optim.AdamW(others, lr=1e-2)]


def muon_like_adamw(model: nn.Module, split: bool) -> Optimizers:
    matrices, _ = hidden_matrices(model)
    options: dict[str, Any] = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}
    return [
        colrow.Muon(matrices, model, **options) if split else torch.optim.Muon(matrices, **options)
    ]


def adafactor(model: nn.Module, split: bool) -> Optimizers:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "eps": (1e-7, 1e-3)}
    if split:
        return [colrow.Adafactor(model.parameters(), model, **options)]
    return [torch.optim.Adafactor(model.parameters(), **options)]


MAKERS: dict[str, Make] = {"muon": muon, "muon-adamw": muon_like_adamw, "adafactor": adafactor}


def take_steps(optimizers: Optimizers, loss: Callable[[], Tensor]) -> list[float]:
    found = []
    for _ in range(STEPS):
        value = loss()
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(value.item())
    return found


@cache
def expected(name: str, optimizer: str, source: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of transformers' model and torch's optimiser, on this process."""
    model, ids = of_transformers(name), batch()
    if source == "decoder":
        whole = _renamed(colrow.full_state_dict(decoder(name, None, Layout())))
        model.load_state_dict(whole, strict=False)
    run: Any = model
    with precision(torch.float64):
        losses = take_steps(
            MAKERS[optimizer](model, False), lambda: run(input_ids=ids, labels=ids).loss
        )
    return losses, {key: value.detach() for key, value in model.state_dict().items()}


def decoder(name: str, mesh: Mesh | None, layout: Layout) -> nn.Module:
    return colrow.from_config(
        CONFIGS[name],
        mesh,
        seed=3,
        dtype=torch.float64,
        sequence_parallel=layout.sequence_parallel,
        tensor_split=layout.tensor_split,
    ).train()


def decoder_steps(
    world: ParallelGroup, name: str, optimizer: str, layout: Layout
) -> tuple[list[float], dict[str, Tensor]]:
    mesh, ids = make_mesh(world, layout), batch()
    model: Any = decoder(name, mesh, layout)
    loss = parallelize(model, mesh, fsdp=layout.fsdp)
    mine = ids.chunk(mesh.dp.size)[mesh.dp.rank]
    count = mine.numel() - mine.shape[0]
    optimizers = MAKERS[optimizer](model, True)
    losses = take_steps(optimizers, lambda: loss(mine, mine) / count)
    return losses, _renamed(colrow.full_state_dict(model))


def _renamed(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-NeoX's head has another name in files than in transformers' model."""
    return {name.replace("embed_out", "lm_head"): value for name, value in whole.items()}


def in_place_steps(
    world: ParallelGroup, name: str, optimizer: str, fsdp: bool
) -> tuple[list[float], dict[str, Tensor]]:
    layout = Layout(tp=2, dp=2, fsdp=True) if fsdp else Layout(tp=world.size)
    mesh, ids = make_mesh(world, layout), batch()
    model: Any = colrow.parallelize(of_transformers(name), mesh)
    if fsdp:
        assert mesh.device_mesh is not None
        fully_shard(model, mesh=mesh.device_mesh["dp"])
    mine = ids.chunk(mesh.dp.size)[mesh.dp.rank]
    optimizers = MAKERS[optimizer](model, True)
    with precision(torch.float64):
        losses = take_steps(optimizers, lambda: model(input_ids=mine, labels=mine).loss)
    return losses, colrow.full_state_dict(model)
