"""Checks of a batch before any work is done on it."""

from __future__ import annotations

import torch
from torch import Tensor

from colrow import rng
from colrow.comm.agreement import different_seeds, require_same
from colrow.comm.group import ParallelGroup
from colrow.comm.steps import PARTED, steps_of
from colrow.models.config import ModelConfig
from colrow.models.stages import Stage


def check_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    past: int,
    longest: int | None,
) -> None:
    """Raises ValueError for shapes that a model cannot use.

    Args:
        past: cached positions before it.
        longest: sequence that the model can take; None where there is no such limit.
    """
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids should be [batch, sequence] with at least one token, "
            f"got {tuple(input_ids.shape)}"
        )
    _check_length(input_ids.shape[0], input_ids.shape[1], attention_mask, past, longest)


def check_stage_input(
    config: ModelConfig,
    stage: Stage,
    x: Tensor,
    length: int | None,
    attention_mask: Tensor | None,
    past: int,
    divided: bool,
) -> int:
    """The length of the whole sequence.

    Args:
        x: token ids for the first stage, hidden states for any other.
        length: what was said about it.
        past: cached positions before it.
        divided: the hidden states are a shard of the sequence.

    Raises:
        ValueError: for shapes that the stage cannot use.
    """
    longest = config.max_positions if config.position == "learned" else None
    if stage.is_first:
        check_batch(x, attention_mask, past, longest)
        return x.shape[1]
    if x.dim() != 3 or x.shape[2] != config.hidden_size:
        raise ValueError(
            f"pipeline stage {stage.index} should get the hidden states of the stage before, "
            f"[batch, sequence, {config.hidden_size}], got {tuple(x.shape)}"
        )
    if length is None and divided:
        raise ValueError(
            f"pipeline stage {stage.index} gets a shard of the sequence: say the length of the "
            "whole, as length=..."
        )
    length = x.shape[1] if length is None else length
    _check_length(x.shape[0], length, attention_mask, past, longest)
    return length


def _check_length(
    rows: int,
    length: int,
    attention_mask: Tensor | None,
    past: int,
    longest: int | None,
) -> None:
    total = past + length
    if longest is not None and total > longest:
        raise ValueError(f"a sequence of {total} positions is longer than the model's {longest}")
    expected = (rows, total)
    if attention_mask is not None and tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask should be {expected} (cached and new positions), "
            f"got {tuple(attention_mask.shape)}"
        )


def check_labels(input_ids: Tensor, labels: Tensor) -> None:
    """Raises ValueError for labels that do not belong to the ids."""
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} should have the shape of input_ids "
            f"{tuple(input_ids.shape)}; they are shifted inside"
        )


def check_next_token(labels: Tensor) -> None:
    """Raises ValueError for sequences without a next token."""
    if labels.dim() == 2 and labels.shape[1] == 1:
        raise ValueError(
            f"the loss of sequences of one token (input_ids {tuple(labels.shape)}) is "
            "undefined: it compares each token with the next one; give it at least two"
        )


def check_same_on_all_ranks(
    tp: ParallelGroup,
    *tensors: Tensor | None,
    dropout_key: int | Tensor | None = None,
    layout: object = None,
    trained: bool = False,
) -> None:
    """Raises ValueError on every rank when the ranks have different tensors or dropout keys.

    ``layout``, how the model is divided, is compared too, by what it prints, and with ``trained``
    what optimisers did to the group's parameters since the last time.

    Sends one all-reduce of 16 bytes, with ``trained`` of 32, see
    :func:`colrow.comm.agreement.require_same`.
    """
    if tp.size == 1 or torch.compiler.is_compiling():
        return
    given = [t for t in tensors if t is not None]
    device = given[0].device
    shapes = f"{[None if t is None else tuple(t.shape) for t in tensors]} {layout}"
    digest = torch.full((), rng.stream_key(0, shapes), dtype=torch.int64, device=device)
    for index, tensor in enumerate(given):
        flat = tensor.reshape(-1).long()
        place = torch.arange(flat.numel(), device=device)
        digest = digest + rng.bits(rng.stream_key(1, index), flat * 1_000_003 + place).sum()
    message = (
        f"the {tp.size} ranks of this {tp.name} group were given different batches (input_ids, "
        "labels, masks and their shapes must be equal on all of them); give every rank of a group "
        "the same batch, and different batches only to different dp ranks"
    )
    if dropout_key is None:
        dropout_key = 0
    else:
        message += "; or they drew different dropout keys"
    digest = digest + rng.bits(dropout_key, torch.ones_like(digest))
    steps, norm = steps_of(tp), None
    if trained:
        norm = steps.take(device)
        digest = digest + rng.bits(steps.digest, torch.ones_like(digest))
    try:
        require_same(digest, tp, message, layer="inputs", device=device, near=norm)
    except ValueError:  # on all ranks: was it the layout, or the key?
        divided = (
            f"the ranks of this {tp.name} group divide the model differently: give all of them the "
            "same layout, tensor_split and layer_split"
        )
        require_same(rng.stream_key(0, str(layout)), tp, divided, layer="inputs", device=device)
        seeds = f"{different_seeds('dropout masks', tp)}, or pass all of them the same dropout_key"
        require_same(dropout_key, tp, seeds, layer="inputs", device=device)
        if trained:
            require_same(steps.digest, tp, PARTED, layer="inputs", device=device, near=norm)
        raise
