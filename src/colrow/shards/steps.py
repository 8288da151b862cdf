"""What optimisers do to divided parameters, so that ranks that part are found out.

A rank that skips a step because of an infinity in its own shard, clips by the norm of its own
shards or sets a learning rate by its own loss leaves the others, and every number is plausible and
wrong from then on. colrow's layers and split models are known here; a hook of torch looks at each
step of an optimiser that holds their parameters. It refuses optimisers and gradient scalers that
are not right on shards, and keeps a few numbers of the step, which the ranks compare with their
next batch.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from colrow import rng
from colrow.comm.compat import local_tensor, uncompiled
from colrow.comm.group import ParallelGroup
from colrow.partition import ShardSpec
from colrow.shards.model_shards import shards_of
from colrow.shards.optimizers import refuse_on_shards

_FEW = 4  # parameters whose gradients are compared: what parts ranks shows in each
_FRAMES = 16  # between a scaler's step and this hook

PARTED = (
    "the ranks of this tp group have updated their parameters differently: one of them skipped a "
    "step, clipped by another norm or has another learning rate. Take colrow.GradScaler(mesh) and "
    "colrow.clip_grad_norm_, which ask all ranks, for torch's, and decide by numbers that all "
    "ranks have"
)


@dataclass(eq=False)
class OptimizerSteps:
    """Of the optimisers of a group's parameters, on this rank.

    Attributes:
        count: steps that were taken.
        digest: a hash of them and of their learning rates.
        norm: of some gradients that all ranks hold, in the steps since the last :meth:`take`; a
            0-d tensor in fp64.
    """

    count: int = 0
    digest: int = 0
    norm: Tensor | None = None

    def add(self, optimizer: torch.optim.Optimizer, replicated: list[Tensor]) -> None:
        """A step that is about to be taken."""
        self.count += 1
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        # Five digits: a rate that two machines compute may differ in its last one.
        known = [f"{float(r):.5g}" for r in rates if not (isinstance(r, Tensor) and r.is_cuda)]
        self.digest = rng.stream_key(self.digest, self.count, *known)
        for parameter in replicated:
            grad = parameter.grad
            if grad is not None and not grad.is_sparse:
                local = local_tensor(grad)
                if local.is_cuda and torch.cuda.is_current_stream_capturing():
                    continue  # its value would be that of the graph's last replay, if any
                norm = torch.linalg.vector_norm(local.detach()).double()
                self.norm = norm if self.norm is None else self.norm + norm

    def take(self, device: torch.device) -> Tensor:
        """The norm, which begins anew."""
        norm, self.norm = self.norm, None
        if norm is None:
            return torch.zeros((), dtype=torch.float64, device=device)
        return norm.to(device)


@dataclass(eq=False)
class _Holding:
    """What an optimiser holds of watched modules.

    Attributes:
        parameters: how many it had when that was found out.
        watched: how many modules had been watched by then.
        replicated: by group, a few parameters that all its ranks hold whole.
    """

    parameters: int
    watched: int
    replicated: dict[ParallelGroup, list[Tensor]] = field(default_factory=dict)


_modules: dict[int, tuple[weakref.ref[nn.Module], ParallelGroup]] = {}  # by id; any can be watched
_steps: weakref.WeakKeyDictionary[ParallelGroup, OptimizerSteps] = weakref.WeakKeyDictionary()
_holdings: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Holding] = weakref.WeakKeyDictionary()
_watched = 0  # modules ever


def watch(module: nn.Module, tp: ParallelGroup) -> None:
    """From now on optimisers of this module's parameters are looked at when they step.

    Args:
        module: a layer whose parameters ``tp`` divides or holds whole, or a model split in place.
    """
    global _watched
    if tp.size == 1:
        return
    _watched += 1
    key = id(module)
    _modules[key] = weakref.ref(module, lambda _: _modules.pop(key, None)), tp
    _look_at_optimizers()


@cache
def _look_at_optimizers() -> None:
    """From now on, once for the process."""
    register_optimizer_step_pre_hook(_before_step)


def steps_of(tp: ParallelGroup) -> OptimizerSteps:
    """Those of the optimisers of this group's parameters."""
    return _steps.setdefault(tp, OptimizerSteps())


@uncompiled
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raises for an optimiser or a scaler that is not right on shards; notes the step.

    Raises:
        ValueError: an optimiser that is known to look at whole tensors.
        RuntimeError: a gradient scaler that does not ask the other ranks.
    """
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    holding = _holdings.get(optimizer)
    # An optimiser that has stepped before may hold parameters that were divided since.
    if holding is None or (holding.parameters, holding.watched) != (count, _watched):
        holding = _holdings[optimizer] = _found(optimizer, count)
    if not holding.replicated:
        return
    _refuse_foreign_scaler()
    for tp, replicated in holding.replicated.items():
        steps_of(tp).add(optimizer, replicated)


def _found(optimizer: torch.optim.Optimizer, count: int) -> _Holding:
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    holding = _Holding(count, _watched)
    for reference, tp in list(_modules.values()):
        module = reference()
        if module is None:
            continue
        for parameter, divided in _known(module):
            if id(parameter) in ids:
                few = holding.replicated.setdefault(tp, [])
                if divided:
                    refuse_on_shards(optimizer)
                elif len(few) < _FEW:
                    few.append(parameter)
    return holding


def _known(module: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """A watched module's parameters and whether each is divided; one that it cannot say is not."""
    shards = shards_of(module)
    if shards is not None:
        for name, parameter in module.named_parameters():
            yield parameter, name in shards.specs
        return
    for name, parameter in module.named_parameters(recurse=False):
        spec = getattr(module, f"{name}_spec", None)
        if isinstance(spec, ShardSpec):
            yield parameter, spec.dim is not None


def _refuse_foreign_scaler() -> None:
    """Raises RuntimeError when a scaler that is not colrow's is what calls for this step."""
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            scaler = frame.f_locals.get("self")
            # A class that looks at gradients in its own way, as FSDP's, may ask other ranks.
            methods = ("unscale_", "_unscale_grads_")
            plain = torch.amp.GradScaler
            own = any(getattr(type(scaler), m) is not getattr(plain, m) for m in methods)
            if isinstance(scaler, plain) and scaler.is_enabled() and not own:
                raise RuntimeError(
                    f"{type(scaler).__name__} of torch looks for infinities in this rank's shards "
                    "alone, so that ranks would skip different steps: use "
                    "colrow.GradScaler(mesh), which takes the same options"
                )
            return
        frame = frame.f_back  # type: ignore[assignment]
