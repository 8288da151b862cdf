"""Ways into torch: names that changed from torch 2.11 to 2.14, and shorter ways."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Called = TypeVar("Called", bound=Callable[..., Any])


def uncompiled(function: Called) -> Called:
    """A function that torch.compile calls between its graphs instead of tracing it.

    As torch.compiler.disable, which imports the compiler at once.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """A tensor that is a DTensor, as such; None for any other.

    There is none before somebody imports torch.distributed.tensor, which takes half as long as
    torch itself, so it is not imported here.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    divided = as_dtensor(tensor)
    if divided is None:
        return tensor
    local: Tensor = divided.to_local()
    return local


# 2.12 renamed the single-tensor collectives; the old names warn from then on.
all_gather_single: Callable[..., dist.Work | None] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
reduce_scatter_single: Callable[..., dist.Work | None] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)

# 2.14 made it public.
set_timeout: Callable[[timedelta, dist.ProcessGroup], None] = (
    getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
)

functional_all_reduce: Callable[..., Any] = functional.all_reduce
functional_all_gather: Callable[..., Any] = (
    getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
)
functional_reduce_scatter: Callable[..., Any] = (
    getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
)


def issue_all_reduce(x: Tensor, op: Any, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Starts an all-reduce in place; the engine's own entry, where it has one, costs less."""
    direct = getattr(group, "reduce_in_place", None)
    if direct is not None:
        work: dist.Work = direct(x, op)
        return work
    pending: dist.Work | None = dist.all_reduce(x, op, group=group, async_op=True)
    return pending


def all_reduce_now(x: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    """All-reduces in place, and returns when it is done."""
    direct = getattr(group, "reduce_now", None)
    if direct is not None:
        direct(x, op)
    else:
        dist.all_reduce(x, op, group=group)


def issue_all_gather(
    output: Tensor, shard: Tensor, group: dist.ProcessGroup | None
) -> dist.Work | None:
    """Starts an all-gather of equal shards."""
    if hasattr(group, "reduce_in_place"):
        work: dist.Work = group.all_gather_single(output, shard)  # type: ignore[union-attr]
        return work
    return all_gather_single(output, shard, group=group, async_op=True)


def issue_reduce_scatter(
    output: Tensor, x: Tensor, group: dist.ProcessGroup | None
) -> dist.Work | None:
    """Starts a reduce-scatter into equal shards."""
    if hasattr(group, "reduce_in_place"):
        work: dist.Work = group.reduce_scatter_single(output, x, None)  # type: ignore[union-attr]
        return work
    return reduce_scatter_single(output, x, group=group, async_op=True)
