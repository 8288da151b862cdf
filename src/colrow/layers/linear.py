"""What the parallel linear layers share: initial values, checks of sizes, their description."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from colrow import rng
from colrow.comm.agreement import common_seed
from colrow.comm.group import ParallelGroup
from colrow.layers.described import Described
from colrow.partition import Partition, ShardSpec
from colrow.sharding import WHOLE, SequenceDivision, Sharding


class Sharded:
    """A layer that was told how to divide its work, see :class:`colrow.sharding.Sharding`."""

    sharding: Sharding

    @property
    def sequence_parallel(self) -> bool:
        """Whether it works on shards of the sequence, unless a call says otherwise."""
        return self.sharding.sequence_parallel

    def divided_sequence(
        self, sequence: SequenceDivision, unless_given: Callable[[], Partition]
    ) -> Partition | None:
        """How the sequence of this call is divided; None where this rank holds all of it.

        Args:
            sequence: what the caller says.
            unless_given: what divides it where the caller leaves that to the layer.
        """
        if not self.sequence_parallel or sequence is WHOLE:
            return None
        return unless_given() if sequence is None else sequence


def reset_linear_(layer: Described) -> None:
    """Uniform on +-1/sqrt(in_features), nn.Linear's default; the same values at any tp size.

    Compares the ranks' seeds (see :func:`colrow.comm.agreement.common_seed`); nothing on meta.
    """
    tp, place = layer.tp, layer.weight.device
    if place.type == "meta":
        return
    seed = common_seed("initial weights", tp, layer=layer.layer, device=place)
    bound = 1 / math.sqrt(layer.weight_spec.shape[-1])
    for name, parameter in layer.named_parameters():
        draw = partial(rng.uniform_between, rng.stream_key(seed, name), bound=bound)
        rng.fill_shard_(parameter, getattr(layer, f"{name}_spec"), tp.rank, draw)


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


def named(module: nn.Module) -> str:
    """A layer in messages: its name in the model, if it has one, and its class."""
    kind, layer = type(module).__name__, getattr(module, "layer", "")
    return f"{layer} ({kind})" if layer else kind


def describe(spec: ShardSpec, bias: bool, tp: ParallelGroup, sequence_parallel: bool) -> str:
    """For ``extra_repr``: rank, global and local shape."""
    local = list(spec.local_shape(tp.rank))
    text = f"weight={list(spec.shape)}, local={local}, tp_rank={tp.rank}/{tp.size}, bias={bias}"
    return text + (", sequence_parallel=True" if sequence_parallel else "")
