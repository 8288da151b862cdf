"""Muon on divided matrices: each is made orthogonal as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.checkpoint.whole_tensors import TensorPart, WholeTensor
from colrow.comm import point_to_point, primitives
from colrow.comm.compat import local_tensor
from colrow.comm.group import ParallelGroup
from colrow.optim.whole import Member, WholeTensorOptimizer
from colrow.partition import Partition
from colrow.shards.boxes import (
    Placement,
    data_parallel_group,
    tensor_parallel_group,
)

_ADJUSTMENTS = ("original", "match_rms_adamw")


@dataclass(frozen=True)
class _Job:
    """One matrix and this rank's part of it.

    Attributes:
        tensor: the matrix.
        place: this rank's placement in the tensor-parallel shard, without FSDP2's.
        update: the tensor-parallel shard of what is to be made orthogonal.
        apply: takes each part of the result that this rank holds, and where it lies in the shard.
    """

    tensor: WholeTensor
    place: Placement
    update: Tensor
    apply: Callable[[TensorPart, Tensor], None]


class Muon(WholeTensorOptimizer):
    """Muon (Jordan et al. 2024) for a model whose matrices are divided over ranks.

    What :class:`torch.optim.Muon` computes on the whole model, whose arguments these are. The
    matrices are those of the whole model under its names: where colrow's decoder keeps Q, K and V
    in one parameter and the checkpoint in three matrices, there are three. Momentum stays divided
    as the parameters are. For each matrix one tensor-parallel rank, in turn, gets all parts of the
    update, makes it orthogonal in bf16, and sends the ranks their parts back.

    Works with tensor and sequence parallelism, also uneven, pipelines, DDP and FSDP2, for the
    decoder, models of :func:`colrow.parallelize`, and modules made of colrow's layers.

    Args:
        params: matrices of ``module``, or groups of them. Embeddings, heads, norms and biases are
            better left to AdamW.
        module: the model, wrapped by DDP or FSDP2 or not.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps: as torch's.
        adjust_lr_fn: "original" (the default) multiplies the learning rate by the square root of
            rows over columns where that is above 1; "match_rms_adamw" by 0.2 times the square root
            of the larger of the two, so that AdamW's learning rate serves (Liu et al. 2025).

    Raises:
        ValueError: a parameter that is no matrix, or not one of the module's.

    Communicates: in each step two exchanges over tp for every ``tp`` matrices, of the matrices'
    elements in bf16; under FSDP2 also a gather over dp of each parameter's.
    """

    label = "Muon"

    def __init__(
        self,
        params: Iterable[Any],
        module: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}={value}: must be at least 0")
        if adjust_lr_fn not in (None, *_ADJUSTMENTS):
            raise ValueError(
                f"adjust_lr_fn={adjust_lr_fn!r}: must be one of {', '.join(_ADJUSTMENTS)}"
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, module, defaults)

    def _take(self, members: dict[int, Member]) -> None:
        for member in members.values():
            shape = member.place.spec.shape
            if any(len(tensor.shape) != 2 for tensor in member.tensors):
                raise ValueError(
                    f"colrow.Muon takes matrices, and {member.name} has the shape {shape}: give it "
                    "to another optimiser, such as torch.optim.AdamW"
                )
        self._members = members

    def _move(self) -> None:
        tp, dp = tensor_parallel_group(self._module), data_parallel_group(self._module)
        for group in self.param_groups:
            jobs = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    jobs += self._jobs(parameter, group, dp)
            options = group["ns_coefficients"], group["ns_steps"], group["eps"]
            for first in range(0, len(jobs), tp.size):
                _orthogonalize(jobs[first : first + tp.size], tp, *options)

    def _jobs(self, parameter: Tensor, group: dict[str, Any], dp: ParallelGroup) -> list[_Job]:
        """One for each matrix of a parameter, whose momentum is brought up to date."""
        member = self._members[id(parameter)]
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        local, mean = local_tensor(grad), local_tensor(state["momentum_buffer"])
        mean.lerp_(local, 1 - group["momentum"])
        update = local.lerp(mean, group["momentum"]) if group["nesterov"] else mean
        update = update.bfloat16()
        weight, rows = local_tensor(parameter.detach()), member.place.rows
        if rows is not None:
            update = _all_rows(update, member, dp)
        weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
        place = Placement(member.place.spec, member.place.tp_rank)

        def job(tensor: WholeTensor) -> _Job:
            rate = float(group["lr"]) * _adjustment(group["adjust_lr_fn"], tensor.shape)

            def apply(part: TensorPart, result: Tensor) -> None:
                if rows is None:
                    part.view(weight).add_(result, alpha=-rate)
                    return
                start = max(part.local[0].start, rows[0])
                stop = min(part.local[0].stop, rows[1])
                if start < stop:
                    own = (slice(start - rows[0], stop - rows[0]), *part.local[1:])
                    if part.transposed:
                        result = result.t()
                    if tensor.expert is None:  # else rows are experts, of which it is one
                        result = result.narrow(0, start - part.local[0].start, stop - start)
                    weight[own].add_(result, alpha=-rate)

            return _Job(tensor, place, update, apply)

        return [job(tensor) for tensor in member.tensors]


def _all_rows(update: Tensor, member: Member, dp: ParallelGroup) -> Tensor:
    """The tensor-parallel shard from FSDP2's rows of it."""
    place = member.place
    rows = place.spec.local_shape(place.tp_rank)[0]
    chunk = -(-rows // dp.size)
    sizes = [min((n + 1) * chunk, rows) - min(n * chunk, rows) for n in range(dp.size)]
    partition = Partition.from_sizes(sizes)
    return primitives.all_gather(update, dp, 0, partition=partition, layer=f"muon {member.name}")


def _orthogonalize(
    jobs: list[_Job],
    tp: ParallelGroup,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> None:
    """At most ``tp.size`` matrices: the n-th is made orthogonal by rank n."""

    def parts(job: _Job, rank: int, owned: bool) -> tuple[TensorPart, ...]:
        return job.tensor.parts(Placement(job.place.spec, rank), owned=owned)

    like = jobs[0].update
    nothing = like.new_empty(0)
    mine = jobs[tp.rank] if tp.rank < len(jobs) else None
    there = [parts(mine, rank, True) if mine else () for rank in range(tp.size)]
    pieces = [_flat([p.view(job.update) for p in parts(job, tp.rank, True)], like) for job in jobs]
    pieces += [nothing] * (tp.size - len(jobs))
    arrived = point_to_point.all_to_all(pieces, [_count(p) for p in there], tp, layer="muon")
    answers = [nothing] * tp.size
    if mine is not None:
        matrix = like.new_empty(mine.tensor.shape)
        for held, flat in zip(there, arrived, strict=True):
            for part, values in _unflat(flat, held):
                matrix[part.whole] = values
        matrix = orthogonalized(matrix, coefficients, steps, eps)
        for rank in range(tp.size):
            wanted = parts(mine, rank, False)
            answers[rank] = _flat([matrix[part.whole] for part in wanted], like)
    here = [parts(job, tp.rank, False) for job in jobs]
    sizes = [_count(found) for found in here] + [0] * (tp.size - len(jobs))
    results = point_to_point.all_to_all(answers, sizes, tp, layer="muon")
    for job, found, flat in zip(jobs, here, results, strict=False):
        for part, values in _unflat(flat, found):
            job.apply(part, values)


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The matrix with singular values near 1, by a quintic Newton-Schulz iteration in bf16.

    As torch.optim.Muon computes it, operation by operation: in 16 bits another order would round
    to other numbers.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _adjustment(how: str | None, shape: tuple[int, ...]) -> float:
    rows, columns = shape
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _flat(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _unflat(flat: Tensor, parts: tuple[TensorPart, ...]) -> list[tuple[TensorPart, Tensor]]:
    sizes = [math.prod(part.shape) for part in parts]
    pairs = zip(parts, flat.split(sizes), strict=True) if parts else ()
    return [(part, values.view(part.shape)) for part, values in pairs]


def _count(parts: tuple[TensorPart, ...]) -> int:
    return sum(math.prod(part.shape) for part in parts)
