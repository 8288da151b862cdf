"""A parallelised model written as its whole model would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow.checkpoint.assemble import full_state_dict
from colrow.comm import primitives
from colrow.inplace.apply.record import inside_wrappers, record_of
from colrow.shards.model_shards import shards_for


def save_pretrained(model: nn.Module, directory: str | Path, **options: Any) -> None:
    """Writes a parallelised model of transformers: weights in safetensors, and its configuration.

    The files are those that the whole model's own ``save_pretrained`` writes, bit for bit: of a
    model of PEFT its adapters, for ``PeftModel.from_pretrained``.

    Communicates: every rank sends its shards to rank 0, which writes; all ranks of the tp group
    must call it, and return when the files are there.

    Args:
        directory: where to; made if need be.
        options: passed to the model's own ``save_pretrained``.

    Raises:
        TypeError: when the model is none of transformers'.
        ValueError: when only a part of it has been parallelised.
        RuntimeError: rank 0 could not write; rank 0 itself raises the reason.
    """
    model = inside_wrappers(model)
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained of its own; "
            "colrow.full_state_dict gives its whole weights on rank 0"
        )
    record = shards_for(model)
    writer: Any = model
    if record is None:
        for name, module in model.named_modules():
            if record_of(module) is not None and hasattr(model, "peft_config"):
                raise ValueError(
                    f"the adapters of this {type(model).__name__} were added to a model that had "
                    "been split: add them before colrow.parallelize"
                )
            if record_of(module) is not None:
                raise ValueError(
                    f"only the part {name!r} of this {type(model).__name__} has been parallelised: "
                    "parallelise the whole model, or save the part"
                )
        writer.save_pretrained(directory, **options)
        return
    whole = full_state_dict(model)
    error: Exception | None = None
    if record.tp.rank == 0:
        try:
            writer.save_pretrained(directory, state_dict=_with_ties(model, whole), **options)
        except Exception as raised:  # the others wait to hear of it
            error = raised
    device = next(model.parameters()).device
    failed = torch.tensor([float(error is not None)], device=device)
    failed = primitives.all_reduce(failed, record.tp, op="max", layer="save")
    if error is not None:
        raise error
    if failed.item():
        raise RuntimeError(f"rank 0 could not write {directory}; see its message")


def _with_ties(model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every name of the state dict: tied parameters under all of theirs, and the buffers."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first[id(parameter)] = name
    named = {
        name: whole[first[id(parameter)]]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return {name: named.get(name, value) for name, value in model.state_dict().items()}
