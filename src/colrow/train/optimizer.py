"""AdamW and its learning rate, as pure functions of the settings and the step."""

from __future__ import annotations

import math

import torch
from torch import nn


def adamw(
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """torch's AdamW (Loshchilov and Hutter 2019); its learning rate is set before each step.

    Matrices decay; norm weights and biases do not. Make it after FSDP2 divided the parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=0.0, betas=betas, eps=eps, fused=True)


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, final_share: float = 0.1
) -> float:
    """Linear warm-up to ``peak``, then a half cosine to ``final_share * peak``.

    Args:
        step: the step that is about to be taken, from 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (final_share + (1 - final_share) * cosine)
