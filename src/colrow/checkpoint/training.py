"""Training checkpoints: saved while training goes on, published whole, read in any layout."""

from __future__ import annotations

import re
import shutil
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from colrow.checkpoint.training_index import check_files, read_index
from colrow.checkpoint.training_plan import ShardLoadPlanner, ShardSavePlanner, StoredShard
from colrow.checkpoint.training_state import Optimizers, collect, held_by_all, listed, make_states
from colrow.checkpoint.training_storage import (
    PART,
    CheckpointReader,
    CheckpointWriter,
    remove_unfinished,
)
from colrow.comm.mesh import Mesh
from colrow.layers.describe import Division
from colrow.leftovers import lock, unlock
from colrow.models.config import ModelConfig
from colrow.shards.boxes import tensor_parallel_group, unwrap
from colrow.shards.same import problem_of

_NAME = re.compile(r"step-(\d{8})")


class TrainingCheckpoints:
    """The checkpoints of one training run, in one directory that all ranks can reach.

    A checkpoint holds the parameters, the buffers of the module's state, every state of the
    optimiser, and what else the caller gives as JSON. It does not depend on how they were divided:
    it can be loaded at other tp, pp and dp sizes, with or without FSDP2. Nothing in it can run
    code.

    Where a module has several optimisers, each for parameters of its own, they are given as a list.

    Args:
        directory: where they are; made when it is missing.
        mesh: the grid of the ranks that train.
        keep: how many of the newest stay.
        group: these ranks' process group for saving, which nothing else uses while a checkpoint is
            under way; by default one is made, which all ranks of the job have to take part in.

    All ranks must make it, and call its methods in the same order.
    """

    def __init__(
        self,
        directory: str | Path,
        mesh: Mesh,
        *,
        keep: int = 3,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must stay")
        self.directory, self._keep = Path(directory), keep
        self._rank, self._ranks = mesh.world.rank, mesh.world_size
        self._tp = mesh.tp
        self._group = group
        if group is None and self._ranks > 1:
            self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="colrow-checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._locked = False

    def lock(self) -> None:
        """On rank 0 makes the directory this object's, as the first :meth:`save` does.

        What killed processes left there unfinished is removed. The lock ends with the object, and
        with its process.

        Raises:
            ValueError: when another process saves there.
        """
        if self._locked or self._rank:
            return
        lock(self.directory, "give this run another directory")
        self._locked = True
        weakref.finalize(self, unlock, self.directory)
        remove_unfinished(self.directory)

    def save(
        self, step: int, module: nn.Module, optimizer: Optimizers, state: dict[str, Any]
    ) -> None:
        """Copies everything to the CPU and writes it in the background.

        Waits for the previous checkpoint first. ``module`` is the one whose parameters are trained,
        wrapped by FSDP2 or DDP or not; ``state`` is anything that JSON can hold.

        What every tp rank is taken to hold is compared first: a parameter, buffer or state that
        nothing says is divided must be the same on all of them.

        Raises:
            RuntimeError: when the previous checkpoint could not be written.
            ValueError: an optimiser that is not right on shards, see
                :func:`colrow.check_optimizer`, or a state that cannot be stored;
                what should be the same on all ranks and differs, by name, on all ranks.
        """
        self.wait()
        tp = tensor_parallel_group(unwrap(module))
        self._agree(problem_of(held_by_all(module, optimizer), tp if tp.size > 1 else self._tp))
        shards, scalars = collect(module, optimizer, copy=True)
        content = {"step": step, "optimizer": scalars, "user": state}
        self._pending = (step, self._thread.submit(self._write, step, shards, content))

    def wait(self) -> None:
        """Returns when the checkpoint under way is published.

        Raises:
            RuntimeError: when it could not be written; says why, and on which rank.
        """
        if self._pending is not None:
            (_, future), self._pending = self._pending, None
            future.result()

    def check(self) -> None:
        """Raises what :meth:`wait` would if the checkpoint under way has failed already."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def steps(self) -> list[int]:
        """The steps of the published checkpoints, in order."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """The step of the newest checkpoint as rank 0 sees it, on all ranks; None without one."""
        steps = self.steps()
        latest: list[int | None] = [steps[-1] if steps else None]
        if self._group is not None:
            dist.broadcast_object_list(latest, group_src=0, group=self._group)
        return latest[0]

    def path(self, step: int) -> Path:
        """The directory of the checkpoint of this step."""
        return self.directory / f"step-{step:08d}"

    def dtype(self, step: int) -> torch.dtype:
        """Of the parameters in the checkpoint of this step."""
        tensors = read_index(self.path(step))["tensors"]
        names = {found["dtype"] for name, found in tensors.items() if name.startswith("model.")}
        found: torch.dtype = getattr(torch, min(names))
        return found

    def parameters(self, step: int) -> set[str]:
        """Names of those in the checkpoint of this step."""
        tensors = read_index(self.path(step))["tensors"]
        return {name.removeprefix("model.") for name in tensors if name.startswith("model.")}

    def check_shapes(self, step: int, config: ModelConfig) -> None:
        """Compares the checkpoint of this step with a configuration, before there is a model.

        Raises:
            ValueError: a parameter of the model that it lacks, or has in another shape.
        """
        tensors = read_index(self.path(step))["tensors"]
        for name, parameter in config.parameters(Division(1)).items():
            shape = list(parameter.shard.shape)
            found = tensors.get(f"model.{name}", {}).get("shape")
            if found != shape:
                raise ValueError(
                    f"{name} has shape {found} in {self.path(step)}, but the run's configuration "
                    f"asks for {shape}: they do not belong together"
                )

    def load(self, step: int, module: nn.Module, optimizer: Optimizers | None) -> dict[str, Any]:
        """Fills the parameters, and the optimiser when there is one; returns the caller's state.

        Every file's checksum is verified first, each by one rank.

        Raises:
            ValueError: a damaged checkpoint, or one of another model; the same on all ranks.
        """
        path = self.path(step)
        index = self._verified(path)
        for one in listed(optimizer):
            make_states(index, module, one)
        shards, _ = collect(module, optimizer, copy=False)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process loads alone
            try:
                load(
                    dict.fromkeys(shards),
                    storage_reader=CheckpointReader(path, index),
                    planner=ShardLoadPlanner(shards),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
            except CheckpointException as error:
                raise ValueError(_cause(error, f"{path} cannot be loaded")) from error
        state: dict[str, Any] = index["state"]["user"]
        return state

    def state(self, step: int) -> dict[str, Any]:
        """What the caller saved with the checkpoint of this step.

        Raises:
            ValueError: an index that is damaged.
        """
        found: dict[str, Any] = read_index(self.path(step))["state"]["user"]
        return found

    def _write(self, step: int, shards: dict[str, StoredShard], content: dict[str, Any]) -> None:
        content = {**content, "optimizer": self._everyones(content["optimizer"])}
        writer = CheckpointWriter(self.path(step), self._rank, content, self.lock)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that one process saves alone
                save(
                    dict.fromkeys(shards),
                    storage_writer=writer,
                    planner=ShardSavePlanner(shards),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException as error:
            if self._locked:
                shutil.rmtree(f"{self.path(step)}{PART}", ignore_errors=True)
            what = f"the checkpoint of step {step} could not be written to {self.directory}"
            raise RuntimeError(_cause(error, what)) from error
        if self._rank == 0:
            for old in self.steps()[: -self._keep]:
                # Renamed first: a name without .part is a whole checkpoint at every moment.
                gone = self.path(old).rename(f"{self.path(old)}{PART}")
                shutil.rmtree(gone, ignore_errors=True)

    def _everyones(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """On rank 0 those of all ranks: a pipeline stage knows its own parameters alone."""
        if self._group is None:
            return scalars
        found: list[dict[str, Any]] = [{} for _ in range(self._ranks)]
        into = found if self._rank == 0 else None
        dist.gather_object(scalars, into, group=self._group, group_dst=0)
        return {name: values for stage in found for name, values in stage.items()}

    def _verified(self, path: Path) -> dict[str, Any]:
        problem, index = "", {}
        try:
            index = read_index(path)
            check_files(path, index["files"], sorted(index["files"])[self._rank :: self._ranks])
        except (ValueError, OSError) as error:
            problem = str(error)
        self._agree(problem)
        return index

    def _agree(self, problem: str) -> None:
        """Raises ValueError on all ranks when one has a problem."""
        problems = [problem]
        if self._group is not None:
            problems = [""] * self._ranks
            dist.all_gather_object(problems, problem, group=self._group)
        for rank, found in enumerate(problems):
            if found:
                raise ValueError(f"{found} (found by rank {rank})")


def _cause(error: CheckpointException, what: str) -> str:
    """One line: what failed, on which rank, and why."""
    failures = error.failures
    rank = min(failures)
    cause: Any = failures[rank]
    cause = cause[0] if isinstance(cause, tuple) else cause
    return f"{what}: rank {rank}: {type(cause).__name__}: {cause}"
