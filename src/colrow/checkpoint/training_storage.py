"""How a training state lies on disk: safetensors files, and an index with their checksums.

``torch.distributed.checkpoint`` keeps its own index as a pickle, which can run any code when it is
loaded. Here the index is JSON and the data is safetensors, neither of which can.

A checkpoint is a directory. It is written under a temporary name and renamed when everything in it,
flushed to the disk, is whole: a directory with the final name is complete or was tampered with,
and the checksums tell.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from colrow.checkpoint.training_index import INDEX, index_text, sha256

PART = ".part"
_UNFINISHED = re.compile(rf"step-\d{{8}}(\.old)?{re.escape(PART)}")


@dataclass(frozen=True)
class _Stored:
    """Where a box was written."""

    file: str
    key: str
    file_bytes: int
    sha256: str


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint: each rank a file, the coordinator the index, then the final name.

    Args:
        directory: the final name.
        rank: of this process among those that write.
        state: what else belongs to the checkpoint, as JSON.
        prepare: called by the coordinator before it writes; what it raises, all ranks raise.
    """

    def __init__(
        self, directory: Path, rank: int, state: dict[str, Any], prepare: Callable[[], None]
    ) -> None:
        self._final, self._rank, self._state = directory, rank, state
        self._prepare = prepare
        self._part = directory.with_name(directory.name + PART)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes an empty directory under the temporary name."""
        if is_coordinator:
            self._prepare()
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's file, flushed to the disk."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner))
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        tensors = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, torch.Tensor)
            tensors[_key(item.index)] = data.contiguous()
        if not tensors:
            return []
        path = self._part / f"rank-{self._rank:05d}.safetensors"
        save_file(tensors, path)
        _flush(path)
        size, digest = path.stat().st_size, sha256(path)
        return [
            WriteResult(
                index=item.index,
                size_in_bytes=tensors[key].nbytes,
                storage_data=_Stored(path.name, key, size, digest),
            )
            for item in plan.items
            for key in [_key(item.index)]
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The index, and the final name."""
        stored = {result.index: result.storage_data for rank in results for result in rank}
        tensors: dict[str, Any] = {}
        for name, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            chunks = []
            for chunk in found.chunks:
                place: _Stored = stored[MetadataIndex(name, chunk.offsets)]
                chunks.append(
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": place.file,
                        "key": place.key,
                    }
                )
            tensors[name] = {
                "dtype": str(found.properties.dtype).removeprefix("torch."),
                "shape": list(found.size),
                "chunks": chunks,
            }
        files = {
            place.file: {"bytes": place.file_bytes, "sha256": place.sha256}
            for place in stored.values()
        }
        index = self._part / INDEX
        index.write_text(index_text(self._state, files, tensors), encoding="utf-8")
        _flush(index)
        _flush(self._part)
        replaced = self._final.with_name(f"{self._final.name}.old{PART}")
        if self._final.exists():  # of the same step, by an earlier run
            self._final.rename(replaced)
        self._part.rename(self._final)
        _flush(self._final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


class CheckpointReader(StorageReader):
    """Reads boxes of a checkpoint; only the bytes that are asked for."""

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self._directory, self._index = directory, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors and their boxes."""
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=getattr(torch, found["dtype"])),
                    size=torch.Size(found["shape"]),
                    chunks=[
                        ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"]))
                        for c in found["chunks"]
                    ],
                )
                for name, found in self._index["tensors"].items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies each part of a stored box to its place."""
        places = {
            (name, tuple(chunk["offsets"])): (chunk["file"], chunk["key"])
            for name, found in self._index["tensors"].items()
            for chunk in found["chunks"]
        }
        open_files: dict[str, Any] = {}
        for item in plan.items:
            file, key = places[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            if file not in open_files:
                open_files[file] = safe_open(self._directory / file, framework="pt")
            ends = map(sum, zip(item.storage_offsets, item.lengths, strict=True))
            part = tuple(map(slice, item.storage_offsets, ends))
            planner.resolve_tensor(item).copy_(open_files[file].get_slice(key)[part])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


def remove_unfinished(directory: Path) -> None:
    """Removes what killed processes left here under temporary names.

    A checkpoint that was about to be replaced by one of the same step gets its name back.
    """
    for part in directory.iterdir():
        if not _UNFINISHED.fullmatch(part.name) or part.is_symlink():
            continue
        replaced = part.name.removesuffix(f".old{PART}")
        if replaced != part.name and (part / INDEX).is_file():
            with suppress(OSError):  # where the new one is there
                part.rename(directory / replaced)
                continue
        shutil.rmtree(part, ignore_errors=True)


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def _flush(path: Path) -> None:
    """Waits until the file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
