"""The router of a mixture of experts, and the losses that keep its choices balanced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from colrow.comm.autograd import apply
from colrow.comm.group import ParallelGroup
from colrow.layers.describe import RouterSpec, Routing
from colrow.layers.described import Described
from colrow.layers.shared import SharedWeights
from colrow.partition import ShardSpec

_TINY = 1e-20  # keeps weights that are all zero from being divided by zero, and changes no other


class Router(Described):
    """Gives each token to the experts whose scores are highest (Shazeer et al. 2017).

    Every rank holds all of it and chooses alike. Its gradient is a sum over ranks: each sees what
    the weights do to its own part of the experts' results.

    Args:
        hidden_size, experts: sizes.
        active: to how many experts a token goes.
        tp: the tensor-parallel group.
        routing: how they are chosen and weighted.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[experts, hidden]``, zero until it is initialised or loaded; ``bias``
    and ``correction`` ``[experts]`` where there are such. The correction has no gradient, and is in
    fp32 for narrower dtypes.
    """

    correction: nn.Parameter
    correction_spec: ShardSpec

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        active: int,
        tp: ParallelGroup,
        *,
        routing: Routing | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        routing = routing or Routing()
        spec = RouterSpec(experts, hidden_size, routing.bias, routing.correction)
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        self.active, self.routing = active, routing
        nn.init.zeros_(self.weight)

    def logits(self, x: Tensor, *, shared: SharedWeights) -> Tensor:
        """For ``[tokens, hidden]`` a number for each expert, ``[tokens, experts]``."""
        weight = shared(self, "weight")
        bias = None if self.bias is None else shared(self, "bias")
        if self.routing.wide:
            wide = torch.promote_types(x.dtype, torch.float32)
            x, weight = x.to(wide), weight.to(wide)
            bias = None if bias is None else bias.to(wide)
        return F.linear(x, weight, bias)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and numbers of each token's experts, ``[tokens, active]``.

        In fp32 for narrower logits.
        """
        routing = self.routing
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if routing.scores == "chosen":
            best, chosen = logits.topk(self.active, dim=-1)
            return torch.softmax(best, dim=-1) * routing.scale, chosen
        softmax = routing.scores == "softmax"
        scores = torch.softmax(logits, dim=-1) if softmax else torch.sigmoid(logits)
        rated = scores.detach()
        if routing.correction:
            rated = rated + self.correction
        if routing.groups > 1:
            rated = self._in_best_groups(rated)
        chosen = rated.topk(self.active, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if routing.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        return weights * routing.scale, chosen

    def _in_best_groups(self, rated: Tensor) -> Tensor:
        """Scores, minus infinity for experts outside of a token's best groups."""
        routing = self.routing
        groups = rated.unflatten(-1, (routing.groups, -1))  # [tokens, groups, experts of one]
        best = groups.topk(routing.best_of_group, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, best.topk(routing.active_groups, dim=-1).indices, True)
        allowed: Tensor = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
        return allowed

    def extra_repr(self) -> str:
        """Size, and how many of the experts are active."""
        return f"{list(self.weight_spec.shape)}, active={self.active}"


class RouterLosses:
    """Takes note of the routers' logits in a forward pass, and makes the losses on them.

    Every rank of the tensor-parallel group has the logits of all tokens and so the whole losses,
    while the gradients of routers and of their inputs are sums over the ranks: each contributes an
    equal share.

    Args:
        active: to how many experts a token goes.
        valid: ``[batch, sequence]``, False where tokens are padding; None where there is none.
        tp: the tensor-parallel group.
    """

    def __init__(self, active: int, valid: Tensor | None, tp: ParallelGroup) -> None:
        self._active, self._tp = active, tp
        self._valid = None if valid is None else valid.reshape(-1)
        self._logits: list[Tensor] = []
        self._made = False

    def add(self, logits: Tensor) -> None:
        """Takes a layer's, ``[tokens, experts]``; nothing when a block is recomputed later."""
        if not self._made:
            self._logits.append(logits)

    def total(self, balance: float, z: float) -> Tensor:
        """The two losses times these coefficients; a coefficient of 0 computes nothing."""
        self._made = True
        logits = [
            apply(_Share, x.to(torch.promote_types(x.dtype, torch.float32)), self._tp.size)
            for x in self._logits
        ]
        found: Tensor = logits[0].new_zeros(())
        if balance:
            found = found + balance * self.balance(logits)
        if z:
            found = found + z * self.z(logits)
        return found

    def balance(self, logits: list[Tensor]) -> Tensor:
        """How unevenly tokens go to the experts; 1 times ``active`` where they do so evenly.

        ``experts * sum_e share_e * probability_e`` with the share of tokens that go to an expert
        and its mean softmax probability, over all tokens of all layers together (Fedus et al. 2021,
        arXiv 2101.03961, equations 4 to 6, as transformers computes it).
        """
        shares = probabilities = logits[0].new_zeros(logits[0].shape[-1])
        rows = logits[0].new_zeros(())
        for layer in logits:
            odds = torch.softmax(layer, dim=-1)
            chosen = torch.zeros_like(odds).scatter_(-1, odds.topk(self._active).indices, 1.0)
            weight = self._weight(odds)
            shares = shares + (chosen * weight).sum(0)
            probabilities = probabilities + (odds * weight).sum(0)
            rows = rows + weight.sum()
        return (shares * probabilities).sum() * shares.numel() / rows**2

    def z(self, logits: list[Tensor]) -> Tensor:
        """The mean of squared logsumexps of the logits, over all tokens of all layers.

        It keeps logits small (Zoph et al. 2022, arXiv 2202.08906, equation 5).
        """
        total = rows = logits[0].new_zeros(())
        for layer in logits:
            weight = self._weight(layer)[:, 0]
            total = total + (layer.logsumexp(-1).square() * weight).sum()
            rows = rows + weight.sum()
        return total / rows

    def _weight(self, like: Tensor) -> Tensor:
        """1 for each token that counts, ``[tokens, 1]``."""
        valid = self._valid
        ones = like.new_ones(like.shape[0]) if valid is None else valid.to(like.dtype)
        return ones[:, None]


class _Share(torch.autograd.Function):
    """Identity; backward divides by the ranks, each of which computes the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None
