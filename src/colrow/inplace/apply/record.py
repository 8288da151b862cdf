"""How a model is split, as an attribute of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from colrow.shards.model_shards import ModelShards, shards_of

REACH_IT = (
    "give colrow.parallelize example_inputs that reach it, or a plan that leaves these layers whole"
)


@dataclass(eq=False)
class SplitRecord(ModelShards):
    """How a model is split, and while it is tried out, how to make it what it was."""

    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def settle(self) -> None:
        """Makes the split final: forgets what would undo it, and frees the memory of that."""
        self.undo.clear()

    def restore(self) -> None:
        """Undoes the split."""
        for step in reversed(self.undo):
            step()
        self.undo.clear()


def record_of(model: nn.Module) -> SplitRecord | None:
    """The record of a parallelised model; None for any other."""
    found = shards_of(model)
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
