"""What a model computes for one batch, and where two such results part."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.tiny_models.architectures import Architecture
from colrow.tiny_models.example_batch import batch, prompt
from colrow.verification.comparison import first_outputs, first_over, relative_error
from colrow.verification.reference import full_precision, quiet_transformers

NEW_TOKENS = 6
_OUTPUTS = ("logits", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds")


@dataclass(frozen=True)
class ModelRun:
    """What a model gave.

    Attributes:
        outputs: logits, and for two towers embeddings, by name.
        loss: the loss, a scalar.
        grads: by parameter; empty until somebody collects them.
        tokens: of ``model.generate``, greedily; None where it cannot or need not continue.
        modules: the output of every module that has one tensor for it, in the order of the
            forward pass.
    """

    outputs: dict[str, Tensor]
    loss: Tensor
    grads: dict[str, Tensor]
    tokens: list[int] | None
    modules: dict[str, Tensor]


def run(architecture: Architecture, model: nn.Module, *, generates: bool = True) -> ModelRun:
    """Outputs, loss and tokens of the model; its parameters have their gradients afterwards.

    Every computation of an fp64 model is in fp64, also where transformers asks for fp32.
    """
    inputs = batch(architecture, model)
    without_labels = {key: value for key, value in inputs.items() if key != "labels"}
    exact = next(model.parameters()).dtype == torch.float64
    with quiet_transformers(), full_precision() if exact else nullcontext():
        model.eval()
        named = {name: module for name, module in model.named_modules() if name}
        with torch.no_grad(), first_outputs(named) as modules:
            result = model(**without_labels)
        outputs = {
            name: getattr(result, name).detach().clone()
            for name in _OUTPUTS
            if isinstance(getattr(result, name, None), Tensor)
        }
        model.train()
        loss = model(**inputs).loss
        loss.backward()
        model.eval()
        tokens = generate(architecture, model) if generates else None
    return ModelRun(outputs, loss.detach(), {}, tokens, modules)


def generate(architecture: Architecture, model: Any) -> list[int] | None:
    """A few tokens of ``model.generate``; None where there is nothing to continue."""
    start = prompt(architecture, model)
    if start is None:
        return None
    tokens: Tensor = model.generate(
        **start, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in tokens.flatten()]


def output_error(ours: ModelRun, whole: ModelRun) -> float:
    """The largest relative error of an output; infinity where one is missing."""
    return max(
        (
            relative_error(ours.outputs[name], value) if name in ours.outputs else float("inf")
            for name, value in whole.outputs.items()
        ),
        default=float("inf"),
    )


def first_difference(ours: ModelRun, whole: ModelRun, limit: float) -> str | None:
    """The first module with an output of the same shape in both that is off by more."""
    pairs = (
        (name, ours.modules[name], value)
        for name, value in whole.modules.items()
        if name in ours.modules and ours.modules[name].shape == value.shape
    )
    return first_over(pairs, limit)
