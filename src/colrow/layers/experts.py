"""A mixture of experts, every one of them divided over the ranks like an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.layers.describe import ExpertsSpec, TableSpec
from colrow.layers.described import Described
from colrow.layers.linear import Sharded
from colrow.layers.mlp import ParallelMLP
from colrow.layers.shared import SharedWeights
from colrow.partition import Partition
from colrow.sharding import SequenceDivision, Sharding


class Router(Described):
    """Gives each token to the experts whose scores are highest (Shazeer et al. 2017).

    Every rank holds all of it and chooses alike. Its gradient is a sum over ranks: each sees what
    the weights do to its own part of the experts' results.

    Args:
        hidden_size, experts: sizes.
        active: to how many experts a token goes.
        tp: the tensor-parallel group.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[experts, hidden]``, zero until it is initialised or loaded.
    """

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        active: int,
        tp: ParallelGroup,
        *,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = TableSpec(experts, hidden_size, "partial")
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        self.active = active
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, *, shared: SharedWeights) -> tuple[Tensor, Tensor]:
        """For ``[tokens, hidden]`` the weights and numbers of the experts, ``[tokens, active]``.

        The softmax over all experts, and the largest of it scaled to a sum of 1 (Mixtral: Jiang et
        al. 2024, section 2.1), in fp32 for narrower inputs.
        """
        scores = F.linear(x, shared(self, "weight"))
        wide = scores if scores.dtype == torch.float64 else scores.float()
        weights, chosen = torch.softmax(wide, dim=-1).topk(self.active, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def extra_repr(self) -> str:
        """Size, and how many of the experts are active."""
        return f"{list(self.weight_spec.shape)}, active={self.active}"


class ParallelExperts(Sharded, nn.Module):
    """``sum_e weight_e(x) * expert_e(x)`` over the experts that the router chooses for a token.

    Every rank holds a part of every expert, divided as in :class:`ParallelMLP`, so tokens stay
    where they are and the ranks are equally loaded whatever the router chooses.

    ================  ===================================  ====================================
    .                 without sequence parallelism         with sequence parallelism
    ================  ===================================  ====================================
    x, result         ``[..., hidden]``, on every rank     ``[..., sequence_local, hidden]``
    forward sends     all-reduce                           all-gather, reduce-scatter
    backward sends    all-reduce                           all-gather, reduce-scatter
    ================  ===================================  ====================================

    Args:
        spec: the experts.
        tp: the tensor-parallel group.
        partition: how the features of an expert are divided; as evenly as possible by default.
        sharding: how the sequence and the collectives are treated; the gathered input is always
            kept, since every expert takes rows of it.
        layer: name for messages and the ledger.

    Raises:
        ValueError: shared experts or biases, which this layer does not compute.
    """

    def __init__(
        self,
        spec: ExpertsSpec,
        tp: ParallelGroup,
        *,
        partition: Partition | None = None,
        sharding: Sharding | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.shared is not None or spec.expert.bias:
            raise ValueError(f"{layer}: experts with biases or shared ones are not computed")
        prefix = f"{layer}." if layer else ""
        self.spec, self.tp = spec, tp
        self.sharding = Sharding.of(sharding)
        self.up_name, self.down_name = f"{prefix}up", f"{prefix}down"
        self.router = Router(
            spec.hidden_size,
            spec.count,
            spec.active,
            tp,
            layer=f"{prefix}router",
            device=device,
            dtype=dtype,
        )
        self.experts = nn.ModuleList(
            ParallelMLP(
                spec.hidden_size,
                spec.expert.ffn_size,
                tp,
                activation=spec.expert.activation,
                gated=spec.expert.gated,
                partition=partition,
                layer=f"{prefix}experts.{number}",
                device=device,
                dtype=dtype,
            )
            for number in range(spec.count)
        )

    def forward(
        self,
        x: Tensor,
        *,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
    ) -> Tensor:
        """See the table of the class; ``sequence`` and ``shared`` as in the linear layers."""
        shared = shared or SharedWeights.of_parameters(
            self.router.shared_parameters(), self.tp, self.router.layer
        )
        divided = self.divided_sequence(
            sequence, lambda: primitives.exchange_sizes(x, self.tp, -2, layer=self.up_name)
        )
        if divided is None:
            x = collectives.copy_to_tp(x, self.tp, layer=self.up_name)
        else:
            x = collectives.gather_from_sequence(x, self.tp, partition=divided, layer=self.up_name)
        rows = x.reshape(-1, x.shape[-1])  # [tokens, hidden]
        weights, chosen = self.router(rows, shared=shared)
        partial = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            result = self._expert(expert, rows[tokens])
            weighted = result * weights[tokens, place, None]  # in fp32, as the router computes
            partial = partial.index_add(0, tokens, weighted.to(partial.dtype))
        partial = partial.view(x.shape)
        if divided is None:
            return collectives.reduce_from_tp(partial, self.tp, layer=self.down_name)
        return collectives.reduce_scatter_to_sequence(
            partial, self.tp, partition=divided, layer=self.down_name
        )

    def _expert(self, expert: nn.Module, x: Tensor) -> Tensor:
        """This rank's part of an expert's result for its tokens, ``[tokens, hidden]``.

        An expert without a token runs too, so that its weights have gradients on every rank.
        """
        assert isinstance(expert, ParallelMLP)
        return F.linear(expert.activated(F.linear(x, expert.up.weight)), expert.down.weight)

    def extra_repr(self) -> str:
        """How many experts, and how many are active."""
        return f"experts={self.spec.count}, active={self.spec.active}"
