"""Contestants of the training workloads: each builds the model on its weights and takes steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.plain import PlainDecoder
from benchmarks.peers.weights import shifted_labels, training_batch
from benchmarks.peers.workloads import Training

LEARNING_RATE = 1e-3


class Trainer(ABC):
    """A model, its optimiser, and a batch.

    Every contestant uses torch's fused AdamW with the same settings, where it can.
    """

    def __init__(self, workload: Training, directory: Path) -> None:
        self.workload = workload
        self.ids = training_batch(workload)
        self.labels = shifted_labels(self.ids)
        self.model = self.build(directory)
        self.optimizer = self.make_optimizer()

    @abstractmethod
    def build(self, directory: Path) -> nn.Module:
        """This rank's part of the model."""

    @abstractmethod
    def loss(self) -> Tensor:
        """The mean loss of the batch, before backward."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, norms do not."""
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def around_backward(self) -> AbstractContextManager[object]:
        """What loss and backward run in."""
        return nullcontext()

    def step(self) -> Tensor:
        """One optimiser step; the loss before it."""
        with self.around_backward():
            loss = self.loss()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def check(self) -> dict[str, list[float]]:
        """The losses of the first steps, which all contestants must share."""
        return {"losses": [float(_whole(self.step())) for _ in range(self.workload.checked)]}

    def measure(self) -> dict[str, list[float]]:
        """Seconds of each step of a turn."""
        for _ in range(self.workload.warmup):
            self.step()
        seconds = []
        for _ in range(self.workload.repeats):
            if dist.is_initialized():
                dist.barrier()
            started = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - started)
        return {"step_seconds": seconds}


def _whole(x: Tensor) -> Tensor:
    """A DTensor's value."""
    full = getattr(x, "full_tensor", None)
    return x if full is None else full()


class Unsplit(Trainer):
    """Plain PyTorch in one process."""

    def build(self, directory: Path) -> nn.Module:
        model = PlainDecoder(self.workload)
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model

    def loss(self) -> Tensor:
        logits = self.model(self.ids)
        return F.cross_entropy(logits.flatten(0, 1), self.labels.flatten())


class Colrow(Trainer):
    """colrow as its users get it: its decoder, its loss, its optimiser."""

    sequence_parallel = False

    def build(self, directory: Path) -> nn.Module:
        import colrow

        size = dist.get_world_size() if dist.is_initialized() else 1
        mesh = colrow.init_mesh(tp=size, device="cpu")
        model = colrow.from_pretrained(
            directory, mesh, sequence_parallel=self.sequence_parallel, dtype=torch.float32
        )
        return model.train()

    def make_optimizer(self) -> torch.optim.Optimizer:
        from colrow.train.optimizer import adamw

        optimizer = adamw(self.model)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        return optimizer

    def loss(self) -> Tensor:
        return self.model.loss(self.ids, self.ids)


class ColrowSequenceParallel(Colrow):
    """colrow with sequence parallelism."""

    sequence_parallel = True
