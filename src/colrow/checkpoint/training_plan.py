"""The boxes of a training state as plans of ``torch.distributed.checkpoint``.

The library does what is general: it matches the boxes that ranks want with those that were stored,
gives boxes that several ranks offer to one of them, and carries a rank's failure to all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from colrow.shards.boxes import Box


@dataclass(frozen=True)
class StoredShard:
    """This rank's boxes of one whole tensor.

    Attributes:
        shape: of the whole tensor.
        dtype: of its elements.
        boxes: each box and its values, ``[*box.sizes]``; to be written to when loading.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[tuple[Box, Tensor], ...]

    def chunk(self, offsets: tuple[int, ...]) -> tuple[Box, Tensor]:
        """The box that begins at ``offsets``."""
        return next(pair for pair in self.boxes if pair[0].offsets == offsets)


class ShardSavePlanner(DefaultSavePlanner):
    """Writes every box of a ``dict[str, StoredShard]``."""

    def __init__(self, shards: dict[str, StoredShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        """One item for each box."""
        items = [
            WriteItem(
                index=MetadataIndex(name, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box),
                    properties=TensorProperties(dtype=shard.dtype),
                    size=torch.Size(shard.shape),
                ),
            )
            for name, shard in self._shards.items()
            for box, _ in shard.boxes
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of a box."""
        index = write_item.index
        return self._shards[index.fqn].chunk(tuple(index.offset or ()))[1]


class ShardLoadPlanner(DefaultLoadPlanner):
    """Reads every box of a ``dict[str, StoredShard]``, from however many stored boxes it takes."""

    def __init__(self, shards: dict[str, StoredShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> LoadPlan:
        """Which part of which stored box goes where.

        Raises:
            ValueError: a tensor that was not stored, or in another shape.
        """
        assert isinstance(self.metadata, Metadata)
        items: list[ReadItem] = []
        for name, shard in self._shards.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"the checkpoint has no tensor {name!r}: it is of another model")
            if tuple(stored.size) != shard.shape:
                raise ValueError(
                    f"{name} has shape {tuple(stored.size)} in the checkpoint, but {shard.shape} "
                    "here: it is of another model"
                )
            chunks = [_chunk(box) for box, _ in shard.boxes]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The place to copy a part of a stored box to."""
        index = read_item.dest_index
        target = self._shards[index.fqn].chunk(tuple(index.offset or ()))[1]
        ends = map(sum, zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return target[tuple(map(slice, read_item.dest_offsets, ends))]


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
