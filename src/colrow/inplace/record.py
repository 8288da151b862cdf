"""What a parallelised model knows about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from colrow.mesh import ParallelGroup
from colrow.partition import ShardSpec


@dataclass(eq=False)
class Record:
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
        """Lets go of what the model was, and of its memory."""
        self.undo.clear()

    def restore(self) -> None:
        """Makes the model what it was."""
        for step in reversed(self.undo):
            step()
        self.undo.clear()


def record_of(model: nn.Module) -> Record | None:
    """The record of a parallelised model; None for any other."""
    found = model.__dict__.get("colrow_record")
    return found if isinstance(found, Record) else None


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
