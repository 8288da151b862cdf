"""transformers' Trainer on tensor-parallel ranks: its own loop, log and files for a split model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm import primitives
from colrow.comm.mesh import Mesh
from colrow.inplace.api import parallelize
from colrow.inplace.apply.record import inside_wrappers
from colrow.inplace.weights.save import save_pretrained
from colrow.launch import rank_environment
from colrow.shards.model_shards import shards_for
from colrow.train.clip import clip_grad_norm_
from colrow.train.clip import grad_norm as whole_norm

SHARDS = "tensor_parallel"  # the folder of a checkpoint in which the split state is
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI = ("OMPI_COMM_WORLD_", "PMI_", "MPI_LOCAL", "MV2_COMM_WORLD_")


class TensorParallelMixin:
    """Makes a Trainer, or a class derived from it, train a model that is split over ranks.

    ``class TensorParallelSFTTrainer(TensorParallelMixin, SFTTrainer)`` is such a class. The Trainer
    of each rank believes to be alone, on its dp rank's part of the data; what follows is this
    class's: gradients are averaged over dp by DistributedDataParallel, logged losses too; the norm
    of the gradients is that of the whole model; one rank logs; checkpoints and saved models are
    whole, and a run continues on any number of tp ranks (not with dp above 1).

    Evaluation takes every row on every dp rank. Not possible are fp16, FSDP and DeepSpeed.

    Args:
        model: of transformers (with adapters of PEFT or not), equal on all ranks. It is split,
            unless it has been.
        args: the training arguments; what they say of devices and processes is the mesh's.
        mesh: the grid of ranks.
        more, options: as for the Trainer.

    Raises:
        ValueError: arguments for what is not possible, or a ``model_init``.

    Communicates: all ranks of the mesh must make one, and call its methods together.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    control: Any
    accelerator: Any
    processing_class: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *more: Any,
        mesh: Mesh,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module) or options.get("model_init") is not None:
            raise ValueError(
                "give a model that has been made: ranks that hold parts cannot make it"
            )
        self.mesh = mesh
        self._group: dist.ProcessGroup | None = None
        environment = rank_environment()
        local_rank = environment.local_rank if environment else 0
        if mesh.world_size > 1:
            ranks = dist.get_process_group_ranks(mesh.world.group)
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        with _alone(mesh):
            args = args or TrainingArguments(output_dir="trainer")
            _check(args, mesh)
            _adopt(args, mesh, local_rank)
            if shards_for(inside_wrappers(model)) is None and mesh.tp.size > 1:
                parallelize(model, mesh)
            super().__init__(model, args, *more, **options)  # type: ignore[call-arg]

    # The data: each dp rank has its part, the ranks of a tp group the same.

    def get_train_dataloader(self) -> Any:
        """This dp rank's batches."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        dp = self.mesh.dp
        if dp.size == 1:
            return loader
        return prepare_data_loader(
            loader,
            self.mesh.device,
            num_processes=dp.size,
            process_index=dp.rank,
            put_on_device=True,
        )

    def _get_num_items_in_batch(self, batch_samples: Any, device: torch.device) -> Any:
        found = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        if found is None:
            return None
        return self._over_dp(torch.as_tensor(found, device=self.mesh.device))

    # Gradients, and the numbers that are logged.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss, of which DistributedDataParallel takes the mean over dp where a sum is due."""
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = found
        if num_items_in_batch is not None and self._divides_by_items:
            loss = loss * self.mesh.dp.size
        return (loss, outputs) if return_outputs else loss

    @property
    def _divides_by_items(self) -> bool:
        own: Any = self
        return bool(own.model_accepts_loss_kwargs or own.compute_loss_func is not None)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        if not training or self.mesh.dp.size == 1 or isinstance(model, DistributedDataParallel):
            return model
        return DistributedDataParallel(model, process_group=self.mesh.dp.group)

    def training_step(self, model: nn.Module, *inputs: Any, **options: Any) -> Any:
        """One microbatch; only the last of a step is averaged over dp."""
        later = (
            isinstance(model, DistributedDataParallel)
            and not self.accelerator.gradient_state.sync_gradients
        )
        with model.no_sync() if later else nullcontext():  # type: ignore[operator]
            return super().training_step(model, *inputs, **options)  # type: ignore[misc]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return clip_grad_norm_(inside_wrappers(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return whole_norm(inside_wrappers(model)) if grad_norm is None else grad_norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *more: Any, **options: Any) -> None:
        if self.control.should_log:
            tr_loss.copy_(self._over_dp(tr_loss) / self.mesh.dp.size)
        super()._maybe_log_save_evaluate(tr_loss, *more, **options)  # type: ignore[misc]

    def _over_dp(self, value: Tensor) -> Tensor:
        return primitives.all_reduce(value.detach().clone(), self.mesh.dp, layer="trainer")

    # Files: models are whole, the state of a checkpoint is colrow's, which any ranks can read.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = self.args.output_dir if output_dir is None else output_dir
        if self.mesh.dp.rank == 0:
            save_pretrained(inside_wrappers(self.model), directory)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(
                getattr(self, "data_collator", None), "tokenizer", None
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
        self._wait()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints = self._checkpoints(output_dir)
        checkpoints.save(self.state.global_step, inside_wrappers(self.model), self._plain(), {})
        checkpoints.wait()
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _save_rng_state(self, output_dir: str) -> None:
        if self.mesh.dp.size > 1 or self.args.should_save:  # the ranks of tp draw the same
            super()._save_rng_state(output_dir)  # type: ignore[misc]
        self._wait()

    def train(self, resume_from_checkpoint: Any = None, *more: Any, **options: Any) -> Any:
        """Trains; continues from a checkpoint where tensor parallelism is all that there is.

        Raises:
            ValueError: a checkpoint with data parallelism, which is not proven to continue.
        """
        if resume_from_checkpoint and self.mesh.dp.size > 1:
            raise ValueError(
                f"resume_from_checkpoint with dp={self.mesh.dp.size} is not possible yet: continue "
                "with tp alone, or use colrow train, which resumes in any layout"
            )
        return super().train(resume_from_checkpoint, *more, **options)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints = self._checkpoints(resume_from_checkpoint)
        checkpoints.load(self._step(checkpoints), inside_wrappers(model or self.model), None)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        checkpoints = self._checkpoints(checkpoint)
        checkpoints.load(self._step(checkpoints), inside_wrappers(self.model), self._plain())
        scheduler = torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self._plain().param_groups, rates, strict=True):
            group["lr"] = rate

    def _checkpoints(self, directory: str) -> TrainingCheckpoints:
        return TrainingCheckpoints(Path(directory) / SHARDS, self.mesh, group=self._group)

    def _step(self, checkpoints: TrainingCheckpoints) -> int:
        step = checkpoints.latest()
        if step is None:
            raise ValueError(
                f"{checkpoints.directory} has no checkpoint: it was saved with save_only_model, or "
                "by another Trainer; load its model and train from there"
            )
        return step

    def _plain(self) -> torch.optim.Optimizer:
        """The optimiser inside accelerate's."""
        found: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return found

    def _wait(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)


class TensorParallelTrainer(TensorParallelMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer for a model that is split over ranks, see :class:`TensorParallelMixin`.

    With ``python train.py`` under torchrun, mpiexec or srun::

        mesh = colrow.init_mesh(tp=2)
        model = AutoModelForCausalLM.from_pretrained(path)
        TensorParallelTrainer(model, arguments, mesh=mesh, train_dataset=rows).train()
    """


@dataclass(frozen=True)
class RankState:
    """What the training arguments know of processes: this rank's numbers, and no distribution.

    Attributes:
        num_processes: that have different data.
        process_index, local_process_index: of this rank among all, and among its host's.
        device: where it computes.
    """

    num_processes: int
    process_index: int
    local_process_index: int
    device: torch.device
    distributed_type: DistributedType = DistributedType.NO

    @property
    def is_main_process(self) -> bool:
        """Whether it is the first of all."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether it is the first of its host."""
        return self.local_process_index == 0


@contextmanager
def _alone(mesh: Mesh) -> Iterator[None]:
    """Inside it nothing says that there are other ranks: accelerate would divide the data."""
    names = [name for name in os.environ if name in _LAUNCHER or name.startswith(_MPI)]
    before = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(before)


def _check(args: TrainingArguments, mesh: Mesh) -> None:
    refused = {
        "fp16": args.fp16 and "use bf16",
        "fsdp": args.fsdp and "use colrow train --fsdp",
        "deepspeed": args.deepspeed and "leave it out",
        "auto_find_batch_size": args.auto_find_batch_size and "give a batch size",
        "use_liger_kernel": args.use_liger_kernel and "leave it out",
    }
    for name, remedy in refused.items():
        if remedy:
            raise ValueError(f"{name} is not possible with a model that is split: {remedy}")
    if mesh.pp.size > 1:
        raise ValueError(f"pp={mesh.pp.size}: a Trainer's model has no pipeline; use tp and dp")


def _adopt(args: TrainingArguments, mesh: Mesh, local_rank: int) -> None:
    """Gives the arguments this rank's device and numbers, in place of what they found."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=mesh.device.type == "cpu")
    values: Any = args
    values.__dict__["_setup_devices"] = mesh.device  # a cached property
    values._n_gpu = 1 if mesh.device.type == "cuda" else 0
    values.distributed_state = RankState(
        num_processes=mesh.dp.size,
        process_index=mesh.world.rank,
        local_process_index=local_rank,
        device=mesh.device,
    )
