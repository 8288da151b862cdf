"""Whether an architecture gives rows that are padded on the left what it gives them alone.

Windows, chunks and sparse attention decide it at lengths that a large model reaches late. A tiny
model of the same architecture reaches all of them within a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from colrow.any_model.configuration import plain_tokens
from colrow.any_model.continuation import Continuation
from colrow.tiny_models.architectures import Architecture, build
from colrow.verification.reference import full_precision, quiet_transformers

Step = Callable[[Tensor, Tensor | None, Continuation], Tensor]
_LENGTH, _PADDINGS = 9, (0, 1, 2, 3, 5, 6, 7)
_STEPS = 8
_TOLERANCE = 1e-9


@cache
def architecture_takes_padding(model_type: str) -> bool:
    """Tried on a tiny random model, in fp64; False for a type of which there is none."""
    try:
        with quiet_transformers(), full_precision():
            model: Any = build(Architecture(model_type)).eval()
            vocab_size = model.config.get_text_config().vocab_size

            def step(ids: Tensor, mask: Tensor | None, cache: Continuation) -> Tensor:
                return cache.step(model, ids, mask)

            return padding_error(step, vocab_size, torch.device("cpu"), _STEPS) <= _TOLERANCE
    except Exception:  # of many classes: whatever an architecture's code raises
        return False


@torch.no_grad()
def padding_error(step: Step, vocab_size: int, device: torch.device, steps: int) -> float:
    """How far the logits of a padded row are from those that it has alone; relative, the worst.

    Args:
        step: the logits of a text's last position, as :meth:`Continuation.step` gives them.
        steps: tokens after the prompt.
    """
    rows, width = len(_PADDINGS), _LENGTH + steps
    ids = plain_tokens(vocab_size, rows * width, device).view(rows, width)
    padding = torch.tensor(_PADDINGS, device=device).view(-1, 1)
    mask = (torch.arange(_LENGTH, device=device) >= padding).long()
    together = _logits(step, ids, mask, 0)
    worst = 0.0
    for row, skipped in enumerate(_PADDINGS):
        alone = _logits(step, ids[row : row + 1], None, skipped)[:, 0]
        errors = (together[:, row] - alone).norm(dim=1) / alone.norm(dim=1)
        worst = max(worst, float(errors.max()))
    return worst


def _logits(step: Step, ids: Tensor, mask: Tensor | None, skipped: int) -> Tensor:
    """Of the prompts in the first columns, then of each token, ``[steps, rows, vocabulary]``."""
    prompts = ids[:, skipped:_LENGTH]
    if mask is not None:
        prompts = prompts * mask
    text = Continuation(ids.shape[1] + 1)
    found = [step(prompts, mask, text)]
    found += [step(ids[:, place : place + 1], None, text) for place in range(_LENGTH, ids.shape[1])]
    return torch.stack(found).double()
