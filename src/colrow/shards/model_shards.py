"""How the parameters of a model are divided, under the names that the whole model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.partition import ShardSpec


@dataclass(eq=False)
class ModelShards:
    """Which parts a rank holds; the attribute ``colrow_record`` of a model that was split in place.

    Attributes:
        tp: the tensor-parallel group.
        specs: how each parameter that is split is divided, by its name.
        names: of all parameters that the model had, tied ones by each of their names.
    """

    tp: ParallelGroup
    specs: dict[str, ShardSpec] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    @property
    def whole(self) -> frozenset[str]:
        """Parameters that every rank holds."""
        return self.names - self.specs.keys()

    def renamed(self, before: nn.Module, after: nn.Module) -> Self:
        """The same for a model that has the same parameters under other names."""
        known = {
            id(parameter): self.specs[name]
            for name, parameter in before.named_parameters(remove_duplicate=False)
            if name in self.specs
        }
        return self.following(known, after)

    def following(self, known: Mapping[int, ShardSpec], model: nn.Module) -> Self:
        """That of a model some of whose parameters, by id, are known to be divided."""
        named = dict(model.named_parameters(remove_duplicate=False))
        specs = {n: known[id(p)] for n, p in named.items() if id(p) in known}
        return type(self)(self.tp, specs, frozenset(named))


def shards_of(model: nn.Module) -> ModelShards | None:
    """Those of a model that was split in place; None for any other."""
    found = model.__dict__.get("colrow_record")
    return found if isinstance(found, ModelShards) else None


def shards_for(model: nn.Module) -> ModelShards | None:
    """As :func:`shards_of`, or for a part of such a model: with the names that it has there.

    Only the model that was split, and those around it, know parameters that were replaced since.
    """
    if (found := shards_of(model)) is not None:
        return found
    outer: Any = model.__dict__.get("colrow_inside")
    whole: nn.Module | None = None if outer is None else outer()
    shards = None if whole is None else shards_of(whole)
    return None if whole is None or shards is None else shards.renamed(whole, model)
