"""Names of torch.distributed that changed between torch 2.11 and 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as functional

# 2.12 renamed the single-tensor collectives; the old names warn from then on.
all_gather_single: Callable[..., dist.Work | None] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
reduce_scatter_single: Callable[..., dist.Work | None] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)

functional_all_reduce: Callable[..., Any] = functional.all_reduce
functional_all_gather: Callable[..., Any] = (
    getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
)
functional_reduce_scatter: Callable[..., Any] = (
    getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
)
