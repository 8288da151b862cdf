"""What a model computes for one batch, and where two such results part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.verification.differences import relative_error
from colrow.verification.reference import FullPrecision, quiet_transformers
from colrow.zoo.architectures import Architecture
from colrow.zoo.inputs import batch, prompt

NEW_TOKENS = 6
_OUTPUTS = ("logits", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds")
# A gradient is compared relative to its own norm, or to this share of the largest one where it is
# below that: an attention's key bias has a gradient of exactly 0, and of rounding errors in fact.
_SMALLEST_GRADIENT = 1e-4


@dataclass(frozen=True)
class Result:
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


def run(architecture: Architecture, model: nn.Module, *, generates: bool = True) -> Result:
    """Outputs, loss and tokens of the model; its parameters have their gradients afterwards.

    Every computation of an fp64 model is in fp64, also where transformers asks for fp32.
    """
    inputs = batch(architecture, model)
    without_labels = {key: value for key, value in inputs.items() if key != "labels"}
    exact = next(model.parameters()).dtype == torch.float64
    with quiet_transformers(), full_precision() if exact else nullcontext():
        model.eval()
        with torch.no_grad(), _captured(model) as modules:
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
    return Result(outputs, loss.detach(), {}, tokens, modules)


def generate(architecture: Architecture, model: Any) -> list[int] | None:
    """A few tokens of ``model.generate``; None where there is nothing to continue."""
    start = prompt(architecture, model)
    if start is None:
        return None
    tokens: Tensor = model.generate(
        **start, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in tokens.flatten()]


@contextmanager
def full_precision() -> Iterator[None]:
    """Where torch is asked for fp32, and where it is not asked at all, it gives fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with FullPrecision():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _captured(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: object, output: object) -> None:
            if isinstance(output, tuple | list) and output:
                output = output[0]
            if isinstance(output, Tensor) and output.is_floating_point():
                outputs.setdefault(name, output.detach().clone())

        return keep

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def output_error(ours: Result, whole: Result) -> float:
    """The largest relative error of an output; infinity where one is missing."""
    return max(
        (
            relative_error(ours.outputs[name], value) if name in ours.outputs else float("inf")
            for name, value in whole.outputs.items()
        ),
        default=float("inf"),
    )


def gradient_errors(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of every gradient of the whole model; infinity where there is none.

    A gradient that the whole model does not have, and that is not 0, counts as wrong too.
    """
    largest = max((float(grad.norm()) for grad in whole.values()), default=0.0)
    errors = {
        name: float(grad.norm()) and float("inf")
        for name, grad in ours.items()
        if name not in whole
    }
    for name, grad in whole.items():
        if name not in ours or ours[name].shape != grad.shape:
            missing = float(grad.norm()) > 1e-12 * largest
            errors[name] = float("inf") if missing else 0.0
            continue
        scale = max(float(grad.norm()), _SMALLEST_GRADIENT * largest) or 1.0
        error = float((ours[name] - grad).norm()) / scale
        errors[name] = error if error == error else float("inf")
    return errors


def first_difference(ours: Result, whole: Result, limit: float) -> str | None:
    """The first module with an output of the same shape in both that is off by more."""
    for name, value in whole.modules.items():
        mine = ours.modules.get(name)
        if mine is None or mine.shape != value.shape:
            continue
        if relative_error(mine, value) > limit:
            return name
    return None
