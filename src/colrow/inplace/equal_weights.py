"""Whether the ranks hold the same whole model."""

from __future__ import annotations

import torch
from torch import nn

from colrow.comm import primitives
from colrow.comm.group import ParallelGroup


def check_equal_weights(model: nn.Module, tp: ParallelGroup) -> None:
    """All ranks must hold the same whole model. Communicates: a few numbers for each parameter.

    Raises:
        ValueError: naming the first parameter that differs, on every rank.
    """
    named = [(n, p) for n, p in model.named_parameters() if not p.is_meta]
    if not named or tp.size == 1:
        return
    rows = []
    for _, parameter in named:
        flat = parameter.detach().flatten().double()
        position = torch.arange(1, flat.numel() + 1, device=flat.device).remainder(1009)
        rows.append(torch.stack([flat.sum(), (flat * position).sum()]))
    mine = torch.stack(rows)
    top = primitives.all_reduce(mine, tp, op="max", layer="check")
    low = -primitives.all_reduce(-mine, tp, op="max", layer="check")
    differs = ((top != low) & ~(top.isnan() & low.isnan())).any(1)
    if differs.any():
        name = named[int(differs.nonzero()[0])][0]
        raise ValueError(
            f"the ranks hold different values of {name}: every rank must start from the same whole "
            "model; load the same checkpoint, or set the same seed before building it"
        )
