"""How a model is split, as an attribute of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.partition import ShardSpec

REACH_IT = (
    "give colrow.parallelize example_inputs that reach it, or a plan that leaves these layers whole"
)


@dataclass(eq=False)
class SplitRecord:
    """How a model is split; it is the attribute ``colrow_record`` of the model.

    Attributes:
        tp: the tensor-parallel group.
        specs: how each parameter that is split is divided, by its name.
        names: of all parameters that the model had, tied ones by each of their names.
    """

    tp: ParallelGroup
    specs: dict[str, ShardSpec] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def whole(self) -> frozenset[str]:
        """Parameters that every rank holds."""
        return self.names - self.specs.keys()

    def settle(self) -> None:
        """Makes the split final: forgets what would undo it, and frees the memory of that."""
        self.undo.clear()

    def renamed(self, before: nn.Module, after: nn.Module) -> SplitRecord:
        """The same for a model that has the same parameters under other names."""
        known = {
            id(parameter): self.specs[name]
            for name, parameter in before.named_parameters(remove_duplicate=False)
            if name in self.specs
        }
        return self.following(known, after)

    def following(self, known: Mapping[int, ShardSpec], model: nn.Module) -> SplitRecord:
        """The record of a model some of whose parameters, by id, are known to be divided."""
        named = dict(model.named_parameters(remove_duplicate=False))
        specs = {n: known[id(p)] for n, p in named.items() if id(p) in known}
        return SplitRecord(self.tp, specs, frozenset(named))

    def restore(self) -> None:
        """Undoes the split."""
        for step in reversed(self.undo):
            step()
        self.undo.clear()


def record_of(model: nn.Module) -> SplitRecord | None:
    """The record of a parallelised model; None for any other."""
    found = model.__dict__.get("colrow_record")
    return found if isinstance(found, SplitRecord) else None


def inside_wrappers(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def record_for(model: nn.Module) -> SplitRecord | None:
    """The record of a parallelised model, or for a part of one: with the names that it has there.

    Only the model that was split, and those around it, know parameters that were replaced since.
    """
    if (found := record_of(model)) is not None:
        return found
    outer: Any = model.__dict__.get("colrow_inside")
    whole: nn.Module | None = None if outer is None else outer()
    record = None if whole is None else record_of(whole)
    return None if whole is None or record is None else record.renamed(whole, model)


def check_whole(model: nn.Module) -> None:
    """Raises ValueError for a model that cannot be split, or is already."""
    for name, module in model.named_modules():
        if record_of(module) is not None:
            what = f"the part {name!r} of this model" if name else "this model"
            raise ValueError(f"{what} has been parallelised already")
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            "the model was made in torch.inference_mode(), where weights have no gradients: build "
            "or load it outside"
        )
