"""The ranks agree before they split: on the weights that they hold, and on what they found.

A rank that fails alone makes that known before the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from colrow import rng
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup

# Ranks that fail at the same place come there within a layer's time of each other, for few tokens.
_PATIENCE = timedelta(seconds=10)

Found = TypeVar("Found")


class LeftAloneError(RuntimeError):
    """This rank failed alone, and the others compute on without it."""


def find_alike(
    find: Callable[[], Found],
    described: Callable[[Found], list[object]],
    tp: ParallelGroup,
    device: torch.device,
) -> Found:
    """What every rank finds in the model by itself; it must be the same on all.

    Communicates: one all-reduce of 24 bytes.

    Args:
        described: plain values that are equal for equal findings.

    Raises:
        ValueError: the ranks found different splits.
        RuntimeError: another rank raised an error; this rank's own is raised as it is.
    """
    found, error, digest = None, None, 0
    try:
        found = find()
        digest = rng.stream_key(0, *described(found))
    except Exception as raised:  # whatever the model's code raises
        error = raised
    mine = torch.tensor([int(error is not None), digest, -digest], device=device)
    failed, top, low = primitives.all_reduce(mine, tp, op="max", layer="check").tolist()
    if error is not None:
        raise error
    assert found is not None
    if failed:
        raise RuntimeError("another rank could not look at the model; see the message of that rank")
    if top != -low:
        raise ValueError(
            "the ranks would split the model in different ways: give all of them the same plan, "
            "example_inputs and versions of torch and transformers"
        )
    return found


def all_arrive(problem: str, tp: ParallelGroup) -> None:
    """Waits until every rank has come to this point; a rank that failed waits 10 s at most.

    They tell each other through the store of the process group and not with a collective: a rank
    that failed alone has left the others inside one, which would take this for its part of it.

    Args:
        problem: of this rank; "" without one.

    Raises:
        LeftAloneError: on a rank with a problem, when another has not come within 10 s. That one
            waits until this rank's process ends.
    """
    if tp.group is None:
        return
    ranks = dist.get_process_group_ranks(tp.group)
    store, group = _get_default_store(), f"colrow/check/{tp.group.group_name}/{ranks}"
    visit = store.add(f"{group}/visits/{tp.rank}", 1)
    store.set(f"{group}/{visit}/{tp.rank}", "come")
    keys = [f"{group}/{visit}/{rank}" for rank in range(tp.size)]
    if not problem:
        store.wait(keys)
        return
    try:
        store.wait(keys, _PATIENCE)
    except RuntimeError as missing:  # of another class in each kind of store
        raise LeftAloneError(
            f"{tp.name} rank {tp.rank} alone failed while the split model was compared with the "
            f"whole one, and has left the others in a collective: {problem}"
        ) from missing


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
