"""Checks of a batch before any work is done on it."""

from __future__ import annotations

import torch
from torch import Tensor

from colrow import rng
from colrow.comm import primitives
from colrow.layers.options import Position
from colrow.mesh import ParallelGroup


def check_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    past: int,
    max_positions: int,
    position: Position,
) -> None:
    """Raises ValueError for shapes that the decoder cannot use."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids should be [batch, sequence] with at least one token, "
            f"got {tuple(input_ids.shape)}"
        )
    total = past + input_ids.shape[1]
    if position == "learned" and total > max_positions:
        raise ValueError(
            f"a sequence of {total} positions is longer than the model's {max_positions}"
        )
    expected = (input_ids.shape[0], total)
    if attention_mask is not None and tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask should be {expected} (cached and new positions), "
            f"got {tuple(attention_mask.shape)}"
        )


def check_same_on_all_ranks(tp: ParallelGroup, *tensors: Tensor | None) -> None:
    """Raises ValueError on every rank when the ranks were given different tensors.

    Sends one all-reduce of 16 bytes: the maxima of a hash and of its negative, which are equal and
    opposite only if all hashes are. Does nothing with one rank, for meta tensors, and inside
    torch.compile. On CUDA the device asserts the result, since reading it here would stall.
    """
    if tp.size == 1 or torch.compiler.is_compiling():
        return
    given = [t for t in tensors if t is not None]
    device = given[0].device
    shapes = str([None if t is None else tuple(t.shape) for t in tensors])
    digest = torch.full((), rng.stream_key(0, shapes), dtype=torch.int64, device=device)
    for index, tensor in enumerate(given):
        flat = tensor.reshape(-1).long()
        place = torch.arange(flat.numel(), device=device)
        digest = digest + rng.bits(rng.stream_key(1, index), flat * 1_000_003 + place).sum()
    digest = digest >> 1  # the negative of the smallest int64 does not exist
    extremes = primitives.all_reduce(
        torch.stack([digest, -digest]), tp, op="max", layer="inputs", in_place=True
    )
    if extremes.is_meta:
        return
    same = extremes[0] == -extremes[1]
    if extremes.is_cuda:
        torch._assert_async(same, f"the {tp.name} ranks were given different batches")
    elif not same:
        raise ValueError(
            f"the {tp.size} ranks of this {tp.name} group were given different batches (input_ids, "
            "labels, masks and their shapes must be equal on all of them); give every rank of a "
            "group the same batch, and different batches only to different dp ranks"
        )
