"""A decoder's place in a pipeline: which of its stages are on this rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.models.stages import LayerSplit, Stage


@dataclass(frozen=True)
class Pipeline:
    """How a model lies over the ranks of ``pp``.

    Attributes:
        split: which blocks each stage holds, and where the stages are.
        pp: the pipeline-parallel group.
        ends: the group of its first and last rank, on these two: a tied embedding's gradient is
            summed over them.

    Raises:
        ValueError: a split for another number of ranks.
    """

    split: LayerSplit
    pp: ParallelGroup
    ends: ParallelGroup | None = None

    def __post_init__(self) -> None:
        if self.split.ranks != self.pp.size:
            raise ValueError(
                f"a layer split over {self.split.ranks} ranks was given to a pipeline of "
                f"{self.pp.size}"
            )

    @classmethod
    def alone(cls, num_layers: int) -> Pipeline:
        """The whole model on one rank."""
        return cls(LayerSplit((num_layers,), 1), ParallelGroup.single("pp"))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """This rank's."""
        return self.split.of_rank(self.pp.rank)


class Blocks(nn.ModuleList):
    """The blocks of this rank, under their numbers in the whole model.

    A list of those that are here, whose names and whose index are the numbers in the whole model,
    so that parameter names do not depend on how the model is divided.
    """

    def __init__(self, blocks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)

    def __getitem__(self, number: int) -> nn.Module:  # type: ignore[override]
        """Block ``number`` of the whole model; negative ones count from the last that is here."""
        if number < 0:
            return list(self)[number]
        found = self._modules.get(str(number))
        if found is None:
            raise IndexError(f"block {number} is not on this rank, which has {list(self._modules)}")
        return found
