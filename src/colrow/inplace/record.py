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
    """

    tp: ParallelGroup
    specs: dict[str, ShardSpec] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

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
