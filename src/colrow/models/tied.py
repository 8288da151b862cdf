"""The gradient of an embedding that is also the head, where the two are on different stages."""

from __future__ import annotations

import torch

from colrow.comm import primitives
from colrow.comm.compat import local_tensor
from colrow.models.decoder import Decoder


@torch.no_grad()
def sum_tied_gradients_(model: Decoder) -> None:
    """Adds up the two parts of a tied embedding's gradient: from the first stage and the last.

    Each holds a copy of the embedding's shard and has its own part of the gradient. With the sum on
    both, equal copies stay equal. To be called once all microbatches have gone back. Does nothing
    where the weights are not tied or both stages are on one rank.

    Communicates: one all-reduce of the embedding's shard over the two ends of the pipeline.
    """
    ends = model.pipeline.ends
    if not model.config.tie_embeddings or ends is None or model.embedding is None:
        return
    if model.pipeline.split.last_rank == 0:
        return
    weight = model.embedding.weight
    if not weight.requires_grad:
        return
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    grad = local_tensor(weight.grad)
    total = primitives.all_reduce(grad, ends, layer="embedding", phase="backward")
    grad.copy_(total)
