"""Adafactor on divided tensors: its means are those of the whole tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.checkpoint.whole_tensors import TensorPart, WholeTensor
from colrow.comm import primitives
from colrow.comm.compat import local_tensor
from colrow.optim.whole import Member, WholeTensorOptimizer
from colrow.shards.boxes import (
    data_parallel_group,
    tensor_parallel_group,
)


@dataclass(frozen=True)
class _Share:
    """A whole tensor and this rank's part of it.

    Attributes:
        tensor: the whole.
        held, owned: the parts here; owned without those that count on another rank.
        rows, columns: where its factors begin in those of the parameter.
    """

    tensor: WholeTensor
    held: tuple[TensorPart, ...]
    owned: tuple[TensorPart, ...]
    rows: int
    columns: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of the means along rows: the tensor's without its last dimension."""
        return self.tensor.shape[:-1]

    @property
    def column_shape(self) -> tuple[int, ...]:
        """Of the means along columns: the tensor's without its last but one."""
        return (*self.tensor.shape[:-2], self.tensor.shape[-1])


class Adafactor(WholeTensorOptimizer):
    """Adafactor (Shazeer and Stern 2018) for a model whose tensors are divided over ranks.

    What :class:`torch.optim.Adafactor` computes on the whole model, whose arguments these are: the
    means of squared gradients along rows and columns, and the sizes of tensors and updates, are
    those of the whole model's tensors under its names. Every rank holds the two factors of each
    whole tensor it has a part of.

    Works with tensor and sequence parallelism, also uneven, pipelines, DDP and FSDP2, for the
    decoder, models of :func:`colrow.parallelize`, and modules made of colrow's layers.

    Args:
        params: parameters of ``module``, or groups of them.
        module: the model, wrapped by DDP or FSDP2 or not.
        lr, beta2_decay, eps, d, weight_decay, maximize: as torch's.

    Attributes:
        whole_state: names of the states that every rank holds whole, for checkpoints.

    Raises:
        ValueError: a parameter that is not one of the module's.

    Communicates: in each step two all-reduces over tp, and under FSDP2 two over dp, of a number for
    each row and column and two for each tensor.
    """

    label = "Adafactor"
    whole_state = frozenset({"row_var", "col_var"})

    def __init__(
        self,
        params: Iterable[Any],
        module: nn.Module,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in (
            ("lr", lr),
            ("weight_decay", weight_decay),
            ("-beta2_decay", -beta2_decay),
        ):
            if not value >= 0.0:
                raise ValueError(f"{name}={value}: must be at least 0")
        if not d >= 1.0:
            raise ValueError(f"d={d}: must be at least 1")
        if (eps[0] is not None and eps[0] < 0) or eps[1] < 0:
            raise ValueError(f"eps={eps}: must be at least 0")
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, module, defaults)

    def _take(self, members: dict[int, Member]) -> None:
        found: dict[int, tuple[_Share, ...]] = {}
        dp = data_parallel_group(self._module)
        for key, member in members.items():
            shares: list[_Share] = []
            rows = columns = 0
            for tensor in member.tensors:
                held, owned = (tensor.parts(member.place, owned=flag) for flag in (False, True))
                if member.place.rows is None and dp.rank > 0:
                    owned = ()  # one of several dp ranks counts what FSDP2 left whole
                shares.append(_Share(tensor, held, owned, rows, columns))
                if len(tensor.shape) > 1:
                    rows += math.prod(shares[-1].row_shape)
                    columns += math.prod(shares[-1].column_shape)
            found[key] = tuple(shares)
        self._shares = found

    def _move(self) -> None:
        work = [
            (group, parameter, share)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
            for share in self._shares[id(parameter)]
        ]
        if not work:
            return
        sums = self._summed([_squares(share, *_local(p, group)) for group, p, share in work])
        sizes = torch.stack([found[0] for found in sums]).tolist()
        for parameter in {id(p): p for _, p, _ in work}.values():
            self._start(parameter)
        for (group, parameter, share), found in zip(work, sums, strict=True):
            self._follow(parameter, group, share, found[1:])
        # Twice computed rather than kept: an update is as large as its parameter.
        norms = []
        for group, parameter, share in work:
            total = sums[0].new_zeros(1)
            for part in share.owned:
                update = self._update(parameter, group, share, part)
                total = total + update.to(total.dtype).square().sum()
            norms.append(total)
        moved = torch.cat(self._summed(norms)).tolist()
        decayed: set[int] = set()
        for (group, parameter, share), size, norm in zip(work, sizes, moved, strict=True):
            count = math.prod(share.tensor.shape)
            step = self.state[parameter]["step"].item()
            rate = min(float(group["lr"]), 1 / step**0.5) * max(
                group["eps"][1], math.sqrt(size / count)
            )
            rate /= max(1.0, math.sqrt(norm / count) / group["d"])
            weight = local_tensor(parameter.detach())
            if id(parameter) not in decayed:
                decayed.add(id(parameter))
                weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
            for part in share.held:
                part.view(weight).add_(self._update(parameter, group, share, part), alpha=-rate)

    def _summed(self, mine: list[Tensor]) -> list[Tensor]:
        """These vectors, added up over tp and FSDP2's dp."""
        total = torch.cat(mine)
        for group in (tensor_parallel_group(self._module), data_parallel_group(self._module)):
            total = primitives.all_reduce(total, group, layer="adafactor", phase="backward")
        return list(total.split([vector.numel() for vector in mine]))

    def _start(self, parameter: Tensor) -> None:
        """Makes the state, in a parameter's first step, and counts the step."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["step"] = torch.zeros(())
            last = self._shares[id(parameter)][-1]
            if grad.dim() > 1:
                local = local_tensor(grad)
                state["row_var"] = local.new_zeros(last.rows + math.prod(last.row_shape))
                state["col_var"] = local.new_zeros(last.columns + math.prod(last.column_shape))
            else:
                state["variance"] = torch.zeros_like(grad)
        state["step"] += 1

    def _follow(
        self, parameter: Tensor, group: dict[str, Any], share: _Share, sums: Tensor
    ) -> None:
        """Brings the means of squared gradients of one whole tensor up to date."""
        state, shape = self.state[parameter], share.tensor.shape
        weight = state["step"].item() ** group["beta2_decay"]
        if len(shape) < 2:
            grad = local_tensor(parameter.grad) if parameter.grad is not None else parameter
            mean = local_tensor(state["variance"])
            for part in share.held:
                part.view(mean).lerp_(part.view(grad).square(), weight)
            return
        rows, columns = sums.split([math.prod(share.row_shape), math.prod(share.column_shape)])
        for name, found, first, length in (
            ("row_var", rows, share.rows, shape[-1]),
            ("col_var", columns, share.columns, shape[-2]),
        ):
            mean = state[name][first : first + found.numel()]
            mean.lerp_((found / length).to(mean.dtype), weight)

    def _update(
        self, parameter: Tensor, group: dict[str, Any], share: _Share, part: TensorPart
    ) -> Tensor:
        """The direction of one part, before it is clipped."""
        _, grad = _local(parameter, group)
        state, eps = self.state[parameter], group["eps"][0]
        if eps is None:
            eps = torch.finfo(parameter.dtype).eps
        if len(share.tensor.shape) < 2:
            estimate = part.view(local_tensor(state["variance"])).clone()
        else:
            rows = state["row_var"][share.rows :][: math.prod(share.row_shape)]
            columns = state["col_var"][share.columns :][: math.prod(share.column_shape)]
            rows, columns = rows.view(share.row_shape), columns.view(share.column_shape)
            mean = rows.mean(-1, keepdim=True).clamp_(min=eps)
            *lead, row, column = part.whole
            at = tuple(lead)
            estimate = rows[(*at, row)].unsqueeze(-1) * columns[(*at, column)].unsqueeze(-2)
            estimate.div_(mean[at].unsqueeze(-1))
        return estimate.clamp_(min=eps * eps).rsqrt_().mul_(part.view(grad))


def _local(parameter: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """This rank's part of a parameter and of its gradient."""
    assert parameter.grad is not None
    grad = local_tensor(parameter.grad)
    return local_tensor(parameter.detach()), -grad if group["maximize"] else grad


def _squares(share: _Share, weight: Tensor, grad: Tensor) -> Tensor:
    """Of the owned parts: the sum of squared weights, and by row and column of gradients."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    size = grad.new_zeros(1, dtype=wide)
    for part in share.owned:
        size = size + part.view(weight).to(wide).square().sum()
    if len(share.tensor.shape) < 2:
        return size
    rows, columns = (grad.new_zeros(s, dtype=wide) for s in (share.row_shape, share.column_shape))
    for part in share.owned:
        squares = part.view(grad).to(wide).square()
        *lead, row, column = part.whole
        rows[(*lead, row)] += squares.sum(-1)
        columns[(*lead, column)] += squares.sum(-2)
    return torch.cat([size, rows.flatten(), columns.flatten()])
