"""Shards divided once more, over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from colrow.comm.mesh import Mesh


def shard_over_dp(
    modules: Sequence[nn.Module], mesh: Mesh, compute_dtype: torch.dtype | None
) -> None:
    """Lets FSDP2 divide the modules' parameters over dp, those inside others first.

    Args:
        compute_dtype: of parameters in forward and backward; gradients are reduced in their own.
    """
    assert mesh.device_mesh is not None
    wide = next(modules[-1].parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=wide)
    for module in modules:
        fully_shard(module, mesh=mesh.device_mesh["dp"], mp_policy=policy)
