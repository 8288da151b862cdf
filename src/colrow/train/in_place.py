"""The model of a training run where transformers' own is split in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow.any_model.configuration import plain_tokens
from colrow.any_model.in_place import InPlaceModel
from colrow.any_model.loading import describe_model, split_in_place
from colrow.comm import primitives
from colrow.comm.mesh import Mesh
from colrow.inplace.observe.modes import configurations
from colrow.inplace.weights.meta import model_of, random_model
from colrow.train.foreign_blocks import NO_SELECTIVE
from colrow.train.settings import TrainSettings

_SAME_LOSS = 1e-4  # relative, of two ways to compute it with parameters of fp32 at least


def check_in_place(settings: TrainSettings) -> None:
    """Raises ValueError for settings that only the described families have."""
    model = describe_model(
        settings.model,
        tp=settings.tp,
        pp=settings.pp,
        in_place=settings.in_place,
        tensor_split=settings.tensor_split or None,
        layer_split=settings.layer_split or None,
    )
    if settings.recompute == "selective":
        raise ValueError(NO_SELECTIVE)
    if settings.recompute == "full" and settings.sequence_parallel:
        raise ValueError(
            f"recompute=full with sequence_parallel: this {model.name} is split in place, and its "
            "blocks cannot run again alone while their tokens are divided: leave one of the two out"
        )


def build_in_place(settings: TrainSettings, mesh: Mesh, dtype: torch.dtype) -> InPlaceModel:
    """transformers' model, split, in evaluation mode.

    With weights, each rank reads its part. From a configuration every rank makes the whole model as
    transformers does after ``torch.manual_seed(seed)``, and keeps its part.

    Raises:
        ValueError: a model that cannot be split, or whose own loss is not that of the next token.
    """
    module: Any
    if settings.from_random:
        module = random_model(Path(settings.model), dtype, settings.seed).to(mesh.device)
    else:
        module = model_of(settings.model, dtype)
    if settings.dropout >= 0 or not settings.from_random:
        set_dropout(module, max(0.0, settings.dropout))
    weights = None if settings.from_random else settings.model
    model = split_in_place(
        module, mesh, weights=weights, sequence_parallel=settings.sequence_parallel
    )
    check_loss(model)
    return model


def set_dropout(module: nn.Module, p: float) -> None:
    """The same probability wherever the model drops out: in its modules and configurations."""
    held = configurations(module)
    inner = [c for config in held for c in vars(config).values() if hasattr(c, "to_dict")]
    configs = {id(c): c for c in (*held, *inner)}
    for place in (*module.modules(), *configs.values()):
        if isinstance(place, nn.Dropout):
            place.p = p
        for name, value in list(vars(place).items()):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and ("dropout" in name or name.endswith("pdrop")):
                setattr(place, name, p)


@torch.no_grad()
def check_loss(model: InPlaceModel) -> None:
    """Compares the next-token loss of a few tokens with what the model's own code calls its loss.

    Raises:
        ValueError: the model's own has other terms, or predicts something else.
    """
    module: Any = model.module
    ids = plain_tokens(model.description.vocab_size, 16, model.device).view(2, 8)
    with model.arithmetic():
        ours = model.loss(ids, ids).double()
        theirs: Tensor = module(input_ids=ids, labels=ids, return_dict=True).loss.double()
    apart = ((ours - theirs).abs() / theirs.abs()).reshape(1)
    if primitives.all_reduce(apart, model.tp, op="max", layer="check").item() > _SAME_LOSS:
        raise ValueError(
            f"the loss of {type(module).__name__} is {theirs.item():.4g} for a few tokens where "
            f"that of the next token is {ours.item():.4g}: colrow train knows the latter alone. "
            "Turn off in the configuration what adds to it (output_router_logits), or train it "
            "in a loop of your own with colrow.parallelize"
        )
