"""What the parallel linear layers share: initial values, checks of sizes, their description."""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from colrow import rng
from colrow.comm.agreement import common_seed
from colrow.comm.group import ParallelGroup
from colrow.partition import Partition, ShardSpec


class SequenceParallel(Protocol):
    """A layer that knows sequence parallelism."""

    sequence_parallel: bool


def reset_linear_(
    weight: Tensor,
    weight_spec: ShardSpec,
    bias: Tensor | None,
    bias_spec: ShardSpec,
    tp: ParallelGroup,
    layer: str,
) -> None:
    """Uniform on +-1/sqrt(in_features), nn.Linear's default; the same values at any tp size.

    Compares the ranks' seeds (see :func:`colrow.comm.agreement.common_seed`); nothing on meta.
    """
    if weight.is_meta:
        return
    seed = common_seed("initial weights", tp, layer=layer, device=weight.device)
    bound = 1 / math.sqrt(weight_spec.shape[1])
    for name, tensor, spec in (("weight", weight, weight_spec), ("bias", bias, bias_spec)):
        if tensor is not None:
            draw = partial(rng.uniform_between, rng.stream_key(seed, name), bound=bound)
            rng.fill_shard_(tensor, spec, tp.rank, draw)


def check_partition(partition: Partition, features: int, argument: str) -> None:
    """Raises ValueError when the partition divides something else than ``features``."""
    if partition.length != features:
        raise ValueError(f"{argument}={features}, but the partition divides {partition.length}")


def check_features(x: Tensor, expected: int, module: nn.Module) -> None:
    """Raises ValueError when the last dimension of a layer's input is wrong."""
    if x.shape[-1] != expected:
        raise ValueError(
            f"{named(module)} expects an input with {expected} features, got shape {tuple(x.shape)}"
        )


def divides_sequence(module: SequenceParallel, sequence: Partition | None) -> bool:
    """Whether a layer works on a shard of the sequence in this call.

    A replicated ``sequence`` says that every rank holds all of it, as in generation with a cache.
    """
    whole = sequence is not None and sequence.is_replicated and sequence.parts > 1
    return module.sequence_parallel and not whole


def named(module: nn.Module) -> str:
    """A layer in messages: its name in the model, if it has one, and its class."""
    kind, layer = type(module).__name__, getattr(module, "layer", "")
    return f"{layer} ({kind})" if layer else kind


def describe(spec: ShardSpec, bias: bool, tp: ParallelGroup, sequence_parallel: bool) -> str:
    """For ``extra_repr``: rank, global and local shape."""
    local = list(spec.local_shape(tp.rank))
    text = f"weight={list(spec.shape)}, local={local}, tp_rank={tp.rank}/{tp.size}, bias={bias}"
    return text + (", sequence_parallel=True" if sequence_parallel else "")
