"""A few steps of ``model.generate``: with a cache a model takes other ways than without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from colrow.verification.reference import quiet_transformers

_STEPS = 3
_STARTS = ("input_ids", "pixel_values", "input_features")


@dataclass
class Steps:
    """What a model gave step by step.

    Attributes:
        logits: of each step; empty where the model does not generate.
        problem: what it raised instead.
    """

    logits: list[Tensor] = field(default_factory=list)
    problem: str = ""


def generated(model: Any, inputs: Mapping[str, Any]) -> Steps:
    """Logits of the first steps of ``model.generate``, with tokens that do not depend on them.

    Args:
        inputs: of a forward pass; generation starts from its tokens, images or sound.
    """
    if not callable(getattr(model, "generate", None)) or not _can_generate(model):
        return Steps()
    start = {name: inputs[name] for name in _STARTS if isinstance(inputs.get(name), Tensor)}
    if not start:
        return Steps()
    try:
        with quiet_transformers():
            result: Any = model.generate(
                **start,
                max_new_tokens=_STEPS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                logits_processor=[_forced],
            )
    except Exception as error:  # whatever the model's code raises
        return Steps(problem=f"{type(error).__name__}: {error}")
    return Steps([step.detach().clone() for step in result.logits or ()])


def _can_generate(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else False


def _forced(ids: Tensor, scores: Tensor) -> Tensor:
    """Scores by which the next token follows from how many there are, whatever the logits."""
    chosen = torch.full_like(scores, -1.0)
    chosen[:, 3 + 7 * ids.shape[-1] % max(1, scores.shape[-1] - 8)] = 1.0
    return chosen
