"""What one rank alone finds or fails at, made known to all before they would wait for it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from colrow import rng
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.inplace.look import Look

# Ranks that fail at the same place come there within a layer's time of each other, for few tokens.
_TOGETHER = timedelta(seconds=10)


class LeftAloneError(RuntimeError):
    """This rank failed alone, and the others compute on without it."""


def look_together(find: Callable[[], Look], tp: ParallelGroup, device: torch.device) -> Look:
    """What every rank found by itself, which must be the same.

    Communicates: one all-reduce of 24 bytes.

    Raises:
        ValueError: the ranks found different splits.
        RuntimeError: another rank raised an error; this rank's own is raised as it is.
    """
    found, error, digest = None, None, 0
    try:
        found = find()
        digest = rng.stream_key(0, *_described(found))
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


def _described(found: Look) -> list[object]:
    proofs = {id(p): p for of_module in found.inference.proofs.values() for p in of_module}
    places = [(name, len(of_module)) for name, of_module in found.inference.proofs.items()]
    groups = [(p.group, sorted(p.shared), sorted(p.cuts.outputs)) for p in proofs.values()]
    return [sorted(found.plan.items()), places, groups]


def all_come(problem: str, tp: ParallelGroup) -> None:
    """Lets a rank that failed go on only when the others have come to the same point.

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
        store.wait(keys, _TOGETHER)
    except RuntimeError as missing:  # of another class in each kind of store
        raise LeftAloneError(
            f"{tp.name} rank {tp.rank} alone failed while the split model was compared with the "
            f"whole one, and has left the others in a collective: {problem}"
        ) from missing
