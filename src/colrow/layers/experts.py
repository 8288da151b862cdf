"""A mixture of experts, every one of them divided over the ranks like an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.layers.activation import ACTIVATIONS, gated
from colrow.layers.describe import Division, ExpertsSpec, StackedSpec, TableSpec
from colrow.layers.described import Described
from colrow.layers.grouped import grouped_linear
from colrow.layers.linear import Sharded, reset_linear_
from colrow.layers.mlp import ParallelMLP
from colrow.layers.router import Router, RouterLosses
from colrow.layers.shared import SharedLayers, SharedWeights
from colrow.partition import Partition
from colrow.sharding import SequenceDivision, Sharding


class StackedLinear(Described):
    """The same linear layer of all experts, of each of which this rank holds a part.

    Args:
        spec: its description.
        tp: the tensor-parallel group.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[experts, out, in]`` and ``bias`` ``[experts, out]``, both divided;
    drawn as nn.Linear's are, the same at any number of ranks.
    """

    def __init__(
        self,
        spec: StackedSpec,
        tp: ParallelGroup,
        *,
        layer: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        reset_linear_(self)

    def extra_repr(self) -> str:
        """Global and local shape."""
        local = list(self.weight_spec.local_shape(self.tp.rank))
        return f"weight={list(self.weight_spec.shape)}, local={local}, bias={self.bias is not None}"


class ExpertStack(nn.Module):
    """The two linear layers of all experts, see :class:`StackedLinear`."""

    def __init__(
        self,
        parts: dict[str, StackedSpec],
        tp: ParallelGroup,
        *,
        layer: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.up, self.down = (
            StackedLinear(parts[name], tp, layer=f"{layer}.{name}", device=device, dtype=dtype)
            for name in ("up", "down")
        )


class ParallelExperts(Sharded, nn.Module):
    """``sum_e weight_e(x) * expert_e(x)`` over the experts that the router chooses for a token.

    Every rank holds a part of every expert, divided as in :class:`ParallelMLP`, so tokens stay
    where they are and the ranks are equally loaded whatever the router chooses. An MLP that all
    tokens pass through beside them ("shared experts") takes part in the same collectives.

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
        division: how features are divided; as evenly as possible by default.
        sharding: how the sequence and the collectives are treated; the gathered input is always
            kept, since every expert takes rows of it.
        layer: name for messages and the ledger.

    Raises:
        ValueError: an activation that is not known.
    """

    def __init__(
        self,
        spec: ExpertsSpec,
        tp: ParallelGroup,
        *,
        division: Division | None = None,
        sharding: Sharding | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.expert.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={spec.expert.activation!r}: must be one of {sorted(ACTIVATIONS)}"
            )
        division = division or Division(tp.size)
        prefix = f"{layer}." if layer else ""
        self.spec, self.tp = spec, tp
        self.sharding = Sharding.of(sharding)
        self.up_name, self.down_name = f"{prefix}up", f"{prefix}down"
        self.router = Router(
            spec.hidden_size,
            spec.count,
            spec.active,
            tp,
            routing=spec.routing,
            layer=f"{prefix}router",
            device=device,
            dtype=dtype,
        )
        self.experts = ExpertStack(
            spec.stacked(division), tp, layer=f"{prefix}experts", device=device, dtype=dtype
        )
        self.shared: ParallelMLP | None = None
        if spec.shared is not None:
            self.shared = ParallelMLP(
                spec.hidden_size,
                spec.shared.ffn_size,
                tp,
                activation=spec.shared.activation,
                gated=spec.shared.gated,
                partition=division.of(spec.shared.ffn_size),
                layer=f"{prefix}shared",
                device=device,
                dtype=dtype,
            )
        self.shared_gate: Described | None = None
        if spec.shared_gate:
            table = TableSpec(1, spec.hidden_size, "partial")
            name = f"{prefix}shared_gate"
            self.shared_gate = Described(table, tp, layer=name, device=device, dtype=dtype)
            nn.init.zeros_(self.shared_gate.weight)
        self._shared_layers = SharedLayers(self)

    def forward(
        self,
        x: Tensor,
        *,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
        losses: RouterLosses | None = None,
    ) -> Tensor:
        """See the table of the class.

        Args:
            sequence, shared: as in the linear layers.
            losses: what takes note of the router's logits for the losses on them.
        """
        shared = shared or self._shared_layers.weights(self.tp, self.router.layer)
        divided = self.divided_sequence(
            sequence, lambda: primitives.exchange_sizes(x, self.tp, -2, layer=self.up_name)
        )
        if divided is None:
            x = collectives.copy_to_tp(x, self.tp, layer=self.up_name)
        else:
            x = collectives.gather_from_sequence(x, self.tp, partition=divided, layer=self.up_name)
        rows = x.reshape(-1, x.shape[-1])  # [tokens, hidden]
        logits = self.router.logits(rows, shared=shared)
        if losses is not None:
            losses.add(logits)
        weights, chosen = self.router.choose(logits)
        result = self._mixed(rows, weights, chosen)
        if self.shared is not None:
            result = result + self._shared(rows, shared)
        result = result.view(x.shape)
        if divided is None:
            return collectives.reduce_from_tp(result, self.tp, layer=self.down_name)
        return collectives.reduce_scatter_to_sequence(
            result, self.tp, partition=divided, layer=self.down_name
        )

    def _mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """This rank's part of the weighted sum of the experts, ``[tokens, hidden]``.

        Args:
            weights, chosen: of each token's experts, ``[tokens, active]``.
        """
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)  # by expert
        tokens, experts = order // chosen.shape[1], flat[order]
        counts = self._counts(flat)
        up, down = self.experts.up, self.experts.down
        hidden = grouped_linear(
            x.index_select(0, tokens), up.weight, counts
        )  # [rows, (2 *) ffn_local]
        if up.bias is not None:
            hidden = hidden + up.bias.index_select(0, experts)
        expert = self.spec.expert
        if expert.gated:
            gate, passed = hidden.chunk(2, dim=-1)
            hidden = gated(gate, passed, expert.activation, expert.clamped)
        else:
            hidden = ACTIVATIONS[expert.activation](hidden)
        result = grouped_linear(hidden, down.weight, counts)  # [rows, hidden]
        if down.bias is not None:  # of this rank's own features
            assert down.bias_spec is not None
            ((first, last),) = down.bias_spec.global_ranges(self.tp.rank)
            bias = down.bias.index_select(0, experts)
            result = result + F.pad(bias, (first, x.shape[-1] - last))
        weighted = result * weights.reshape(-1)[order, None]  # in fp32, as the router computes
        return torch.zeros_like(x).index_add(0, tokens, weighted.to(x.dtype))

    def _counts(self, experts: Tensor) -> list[int]:
        """How many rows each expert has; as even as possible on meta, where none is chosen."""
        if experts.is_meta:
            return list(Partition.even(experts.numel(), self.spec.count).sizes)
        found: list[int] = torch.bincount(experts, minlength=self.spec.count).tolist()
        return found

    def _shared(self, x: Tensor, shared: SharedWeights) -> Tensor:
        """This rank's part of what the shared experts give, ``[tokens, hidden]``."""
        assert self.shared is not None
        hidden = self.shared.activated(F.linear(x, self.shared.up.weight))
        result = F.linear(hidden, self.shared.down.weight)
        if self.shared_gate is None:
            return result
        return result * torch.sigmoid(F.linear(x, shared(self.shared_gate, "weight")))

    def extra_repr(self) -> str:
        """How many experts, and how many are active."""
        return f"experts={self.spec.count}, active={self.spec.active}"
