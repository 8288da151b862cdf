"""The optimisers of a run and their learning rate, from the settings and the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from colrow.models.interface import TensorParallelModel
from colrow.optim.adafactor import Adafactor
from colrow.optim.muon import Muon
from colrow.train.settings import TrainSettings


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
    groups = _decayed(list(model.parameters()), weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def make_optimizers(
    model: TensorParallelModel, settings: TrainSettings
) -> list[torch.optim.Optimizer]:
    """Those of ``settings.optimizer``; the learning rate is set before each step.

    Matrices decay; norm weights and biases do not. Muon takes the matrices of blocks and has
    AdamW's learning rate (Liu et al. 2025, section 2.2); AdamW takes what is left.
    """
    module, decay = model.module, settings.weight_decay
    parameters = [p for p in module.parameters() if p.requires_grad]
    betas = settings.beta1, settings.beta2
    if settings.optimizer == "sgd":
        groups = _decayed(parameters, decay)
        return [torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum)]
    if settings.optimizer == "adafactor":
        return [Adafactor(_decayed(parameters, decay), module, lr=0.0)]
    found: list[torch.optim.Optimizer] = []
    if settings.optimizer == "muon":
        inside = {id(p) for block in model.blocks for p in block.parameters() if p.dim() == 2}
        matrices = [p for p in parameters if id(p) in inside]
        parameters = [p for p in parameters if id(p) not in inside]
        found.append(
            Muon(
                matrices,
                module,
                lr=0.0,
                momentum=settings.momentum,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = _decayed(parameters, decay)
    eps = settings.epsilon
    return [*found, torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)]


def _decayed(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Groups of the trained ones: matrices with weight decay, vectors without."""
    trained = [p for p in parameters if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() >= 2) == flag] for flag in (True, False))
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
