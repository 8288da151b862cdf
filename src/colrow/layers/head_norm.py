"""Norms of queries and keys, whose heads are divided over the ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.layers.describe import NormSpec, unknown
from colrow.layers.described import Described
from colrow.layers.norm import RMSNorm, factor, rms_norm, widened
from colrow.layers.shared import SharedWeights
from colrow.partition import Partition


class DividedRMSNorm(Described):
    """An RMS norm over features of which each rank has some: those of all heads together.

    The ranks add up the squares of what they have, see :func:`normed_together`. What several ranks
    have (keys that are read on both) counts once, and its weight's gradient is summed over them.

    Args:
        spec: with a ``partition``.
        tp: the tensor-parallel group.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[size_local]``.
    """

    def __init__(
        self,
        spec: NormSpec,
        tp: ParallelGroup,
        *,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if spec.partition is None or spec.kind != "rmsnorm":
            raise ValueError(f"{layer}: an RMS norm with a partition is needed, not {spec}")
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        self.spec = spec
        start, stop = spec.partition.bounds[tp.rank]
        before = max((end for _, end in spec.partition.bounds[: tp.rank]), default=start)
        self._first_counted = min(max(start, before), stop) - start

    def squares(self, x: Tensor) -> Tensor:
        """``[..., size_local]`` to this rank's part of the sum of squares, ``[...]``, in fp32."""
        return widened(x[..., self._first_counted :]).square().sum(-1)

    def scaled(self, x: Tensor, squares: Tensor, shared: SharedWeights) -> Tensor:
        """The norm of ``[..., size_local]``, given the sum over all ranks, ``[...]``."""
        weight, wide = factor(shared(self, "weight"), self.spec.centred), widened(x)
        scale = torch.rsqrt(squares / self.spec.size + self.spec.eps).unsqueeze(-1)
        if self.spec.wide:
            return (wide * scale * weight).to(x.dtype)
        return ((wide * scale).to(x.dtype) * weight).to(x.dtype)

    def extra_repr(self) -> str:
        """Size held and in all."""
        return f"{self.weight.numel()} of {self.spec.size}, eps={self.spec.eps}"


def normed_together(
    norms: tuple[DividedRMSNorm, ...], values: tuple[Tensor, ...], shared: SharedWeights, layer: str
) -> tuple[Tensor, ...]:
    """Several divided norms, whose squares travel together.

    Communicates: an all-reduce of one number in fp32 (fp64 for fp64) for each norm and token, once
    in forward and once in backward.

    Args:
        values: ``[batch, sequence, heads_local, head_dim]`` for each of the norms.
        layer: name for the ledger.
    """
    tp, flat = norms[0].tp, [value.flatten(2) for value in values]
    mine = torch.stack([norm.squares(x) for norm, x in zip(norms, flat, strict=True)], dim=-1)
    # Every rank goes on with the sum, for features of its own: its gradient is a sum as well.
    total = collectives.copy_to_tp(
        collectives.reduce_from_tp(mine, tp, layer=layer), tp, layer=layer
    )
    return tuple(
        norm.scaled(x, squares, shared).view(value.shape)
        for norm, x, squares, value in zip(norms, flat, total.unbind(-1), values, strict=True)
    )


class EachHeadsLayerNorm(Described):
    """A LayerNorm without bias of each head's features; each head has a weight of its own (Cohere).

    Args:
        spec: with ``heads``, and their partition.
        tp: the tensor-parallel group.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[heads_local, size]``.
    """

    def __init__(
        self,
        spec: NormSpec,
        tp: ParallelGroup,
        *,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if spec.kind != "layernorm" or spec.bias or spec.partition is None or spec.centred:
            unknown(spec, "attention")
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        self.spec = spec

    def forward(self, x: Tensor, *, shared: SharedWeights) -> Tensor:
        """``[batch, sequence, heads_local, size]`` to the same shape."""
        normed = F.layer_norm(widened(x), (self.spec.size,), eps=self.spec.eps)
        return (normed * widened(shared(self, "weight"))).to(x.dtype)

    def extra_repr(self) -> str:
        """Heads held and in all."""
        return (
            f"{len(self.weight)} of {self.spec.heads} heads, {self.spec.size}, eps={self.spec.eps}"
        )


def head_norm(
    norm: NormSpec,
    tp: ParallelGroup,
    heads: Partition,
    *,
    over_all: bool,
    layer: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RMSNorm | DividedRMSNorm | EachHeadsLayerNorm:
    """The norm of queries or keys: of each head, or of all heads' features.

    Args:
        heads: how they are divided.
        over_all: whether it goes over all heads' features.

    Raises:
        ValueError: a kind of norm that is not computed there.
    """
    if norm.heads:
        own = replace(norm, partition=heads)
        return EachHeadsLayerNorm(own, tp, layer=layer, device=device, dtype=dtype)
    if norm.kind != "rmsnorm":
        unknown(norm, "attention")
    if over_all:
        divided = replace(norm, partition=heads.scaled(norm.size // heads.length))
        return DividedRMSNorm(divided, tp, layer=layer, device=device, dtype=dtype)
    return rms_norm(norm, tp, "shard", layer=layer, device=device, dtype=dtype)
