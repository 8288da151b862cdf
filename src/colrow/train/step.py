"""One optimiser step: gradients of the global batch, their norm, the update."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from colrow import rng
from colrow.checkpoint.training_state import Optimizers, listed
from colrow.comm import primitives
from colrow.comm.mesh import Mesh
from colrow.launch.places import moved
from colrow.optim.scaler import GradScaler
from colrow.pipeline.runner import PipelineRunner
from colrow.train.batches import IGNORED, Order, Windows
from colrow.train.clip import grad_norm, scale_grads_
from colrow.train.faults import not_finite

SMALLEST_SCALE = 2.0**-14  # of an fp16 loss: below it, overflow has another cause


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over the tokens of the global batch that count.
        tokens: how many count.
        grad_norm: before clipping; infinite or nan in a step that was skipped.
        stop: whether some rank was asked to stop.
        skipped: nothing was updated, because a gradient of the scaled fp16 loss overflowed.
    """

    loss: float
    tokens: int
    grad_norm: float
    stop: bool
    skipped: bool = False


class Stepper:
    """Takes optimiser steps; the sums over the batch do not depend on how it is divided.

    Args:
        model: the module that has the parameters, in training mode.
        loss: what :func:`colrow.train.parallel.parallelize` made of it, or in a pipeline the
            :class:`colrow.pipeline.runner.PipelineRunner` of its stages.
        optimizer: of its parameters, or several that share them.
        order: which sequences come when.
        global_batch: sequences of a step; a multiple of ``dp x microbatch``.
        clip: largest gradient norm; 0 does not clip.
        dropout_seed: of the dropout masks, which depend on it, the sequence's place in the run and
            the size of the microbatch alone.
        scaler: of the loss, for fp16. A step whose gradients overflow is then skipped on all ranks,
            and the next ones have a smaller scale.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | PipelineRunner,
        optimizer: Optimizers,
        mesh: Mesh,
        order: Order,
        *,
        microbatch: int,
        global_batch: int,
        clip: float = 1.0,
        dropout_seed: int = 0,
        scaler: GradScaler | None = None,
    ) -> None:
        self.model, self.loss, self.optimizer, self.mesh = model, loss, optimizer, mesh
        self.optimizers = listed(optimizer)
        self.order, self.microbatch, self.global_batch = order, microbatch, global_batch
        self.clip, self._dropout_seed, self.scaler = clip, dropout_seed, scaler

    def step(self, index: int, learning_rate: float, *, stop: bool = False) -> StepResult:
        """Step number ``index``, from 0.

        Args:
            stop: whether this rank was asked to stop, which all learn from the result.

        Raises:
            RuntimeError: the loss or a gradient is not finite; nothing was updated then. In fp16 a
                gradient may be for as long as its scale can still become smaller.
            ValueError: no token of the batch counts.

        Communicates: beside the layers' and the data parallelism's collectives, the number of
        tokens over dp, the loss over all ranks, the norm (:func:`colrow.clip_grad_norm_`), and in
            fp16 whether it overflowed (:class:`colrow.GradScaler`).
        """
        moved()
        batches = self._microbatches(index)
        mine = torch.tensor(sum(counted(labels) for _, labels, _ in batches))
        device = self.mesh.device
        tokens = int(primitives.all_reduce(mine.to(device), self.mesh.dp, layer="tokens").item())
        if tokens == 0:
            raise ValueError(f"no token of the batch of step {index} counts in the loss")
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        losses = self._backward_all(batches, scale / tokens)
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        report = torch.tensor([0.0, float(stop)], dtype=torch.float64, device=device)
        if losses and self.mesh.tp.rank == 0:
            report[0] = torch.stack(losses).double().sum()
        report = primitives.all_reduce(report, self.mesh.world, layer="loss")
        mean, norm = report[0].item() / tokens, grad_norm(self.model)
        finite = math.isfinite(mean) and math.isfinite(norm.item())
        scaler = self.scaler
        overflow = scaler is not None and any(map(scaler.found_inf, self.optimizers))
        skipped = overflow and math.isfinite(mean) and scale > SMALLEST_SCALE
        if not finite and not skipped:
            own = [value.item() for value in losses]
            raise RuntimeError(not_finite(index, mean, self.model, own, self.mesh))
        if self.clip and not skipped:
            factor = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
            scale_grads_(self.model.parameters(), factor)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if scaler is None:
                optimizer.step()
            elif not overflow:
                scaler.step(optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()
        return StepResult(mean, tokens, norm.item(), bool(report[1].item()), skipped)

    def _microbatches(self, index: int) -> list[tuple[Tensor, Tensor, int]]:
        """This dp rank's ids, labels and dropout keys; microbatch ``n`` of all is rank n % dp's."""
        dp, size, found = self.mesh.dp, self.microbatch, []
        for number in range(dp.rank, self.global_batch // size, dp.size):
            first = index * self.global_batch + number * size
            ids, labels = self.order.batch(first, size)
            key = rng.stream_key(self._dropout_seed, "dropout", first)
            found.append((ids.to(self.mesh.device), labels.to(self.mesh.device), key))
        return found

    def _backward_all(
        self, batches: list[tuple[Tensor, Tensor, int]], scale: float
    ) -> list[Tensor]:
        """Adds the gradients of all microbatches; their losses, on the ranks that know them."""
        if isinstance(self.loss, PipelineRunner):
            return self.loss.backward(batches, scale)
        loss = self.loss
        return [self._backward(loss, batch, scale, batch is batches[-1]) for batch in batches]

    def _backward(
        self, loss: nn.Module, batch: tuple[Tensor, Tensor, int], scale: float, last: bool
    ) -> Tensor:
        """Adds a microbatch's gradients; DDP reduces them once, FSDP2 after every microbatch."""
        later = isinstance(loss, DistributedDataParallel) and not last
        with loss.no_sync() if later else nullcontext():  # type: ignore[operator]
            summed: Tensor = loss(*batch)
            moved()
            # Data parallelism averages over the dp ranks; the mean over all tokens is wanted.
            (summed * (self.mesh.dp.size * scale)).backward()
        return summed.detach()


@torch.no_grad()
def evaluate(
    loss: nn.Module | PipelineRunner,
    mesh: Mesh,
    windows: Windows,
    *,
    microbatch: int,
    sequences: int,
) -> float:
    """Mean loss per token of the first ``sequences`` of ``windows``, on every rank.

    Without dropout, label smoothing and z-loss.

    Communicates: as forward passes do, and one all-reduce over all ranks.
    """
    count = min(sequences, windows.count)
    order = Order(windows, 0)
    batches: list[tuple[Tensor, Tensor]] = []
    rounds = -(-count // (microbatch * mesh.dp.size))
    for number in range(rounds):
        first = (number * mesh.dp.size + mesh.dp.rank) * microbatch
        ids, labels = order.batch(first, microbatch)  # every rank takes part in every round
        beyond = torch.arange(first, first + microbatch, device="cpu") >= count
        labels = labels.masked_fill(beyond[:, None], IGNORED)
        batches.append((ids.to(mesh.device), labels.to(mesh.device)))
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    losses = loss.losses(batches) if isinstance(loss, PipelineRunner) else _losses(loss, batches)
    if losses and mesh.tp.rank == 0:
        total[0] = torch.stack(losses).double().sum()
        total[1] = sum(counted(labels) for _, labels in batches)
    total = primitives.all_reduce(total, mesh.world, layer="evaluation")
    return (total[0] / total[1]).item()


def _losses(loss: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    if isinstance(loss, DistributedDataParallel):
        loss = loss.module
    loss.eval()
    found = [loss(*batch) for batch in batches]
    loss.train()
    return found


def counted(labels: Tensor) -> int:
    """How many predictions count: labels are shifted, so the first of a sequence is not one."""
    return int((labels[:, 1:] != IGNORED).sum())
