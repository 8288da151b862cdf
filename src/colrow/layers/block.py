"""One transformer block: attention and MLP with their norms and residual connections."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.comm import primitives
from colrow.comm.agreement import common_seed
from colrow.comm.group import ParallelGroup
from colrow.layers.attention import ParallelAttention
from colrow.layers.context import AttentionCache, AttentionContext
from colrow.layers.dropout import ParallelDropout
from colrow.layers.experts import ParallelExperts
from colrow.layers.latent import LatentAttention
from colrow.layers.linear import Sharded
from colrow.layers.memory_saving import Recompute, cast_parameters, recomputed
from colrow.layers.mlp import ParallelMLP
from colrow.layers.norm import LayerNorm, RMSNorm
from colrow.layers.router import RouterLosses
from colrow.layers.shared import SharedLayers, SharedWeights
from colrow.partition import Partition
from colrow.sharding import WHOLE, SequenceDivision


class BlockOptions(TypedDict, total=False):
    """What a pass through a block is given besides its input.

    All as in attention, but ``router_losses``, which experts take.
    """

    context: AttentionContext | None
    cache: AttentionCache | None
    sequence: SequenceDivision
    shared: SharedWeights | None
    dropout_key: int | Tensor | None
    router_losses: RouterLosses | None


class ParallelBlock(Sharded, nn.Module):
    """A block whose norms stand before its layers, behind them or both; serial or parallel.

    Serial: ``x += post(attention(pre(x)))``, then ``x += post'(mlp(pre'(x)))``.
    Parallel (GPT-J, GPT-NeoX): ``x += attention(pre(x)) + mlp(pre'(x))``.

    Shapes and communication are those of :class:`ParallelAttention` plus those of the other layer:
    per direction two all-reduces, or two all-gathers and two reduce-scatters with sequence
    parallelism.

    Args:
        attention: the first layer.
        mlp: the second, :class:`ParallelMLP` or :class:`ParallelExperts`; the two must agree on
            sequence parallelism.
        attention_norm, mlp_norm: norms in front of them, or None.
        attention_post_norm, mlp_post_norm: norms behind them, before the result is added, or None.
        parallel_residual: which of the two forms.
        one_norm: of the parallel form: the MLP reads what attention's norm gives.
        residual_scale: what the layers give is multiplied by it before it is added.
        dropout: on the output of both layers, in training.

    Attributes:
        own_bucket: sum the gradients of parameters that several ranks hold in a collective of this
            block, not in the model's. For what swaps a block's parameters while it runs (FSDP2).
        compute_dtype: matmuls and activations have this dtype, while the parameters, and so their
            gradients, keep their own; None leaves everything as it is. Needs ``own_bucket``, or a
            model that sums shared gradients afterwards.
        recompute: "full" keeps only the block's input for backward (Chen et al. 2016), "selective"
            recomputes the attention between the projections (Korthikanti et al. 2022, section 5),
            "none" keeps everything.

    Raises:
        ValueError: layers and norms that disagree on sequence parallelism.
    """

    def __init__(
        self,
        attention: ParallelAttention | LatentAttention,
        mlp: ParallelMLP | ParallelExperts,
        attention_norm: nn.Module | None,
        mlp_norm: nn.Module | None,
        tp: ParallelGroup,
        *,
        attention_post_norm: nn.Module | None = None,
        mlp_post_norm: nn.Module | None = None,
        parallel_residual: bool = False,
        one_norm: bool = False,
        residual_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.sharding = attention.sharding
        if self.sequence_parallel != mlp.sequence_parallel:
            raise ValueError("attention and mlp of a block must agree on sequence_parallel")
        needed = "shard" if self.sequence_parallel else "all"
        for norm in (attention_norm, attention_post_norm, mlp_norm, mlp_post_norm):
            if isinstance(norm, RMSNorm | LayerNorm) and norm.applied_to != needed:
                raise ValueError(
                    f"with sequence_parallel={self.sequence_parallel} the norms of a block "
                    f"need applied_to={needed!r}, got {norm.applied_to!r}"
                )
        self.tp = tp
        self.attention_norm, self.attention = attention_norm, attention
        self.attention_post_norm = attention_post_norm
        self.mlp_norm, self.mlp, self.mlp_post_norm = mlp_norm, mlp, mlp_post_norm
        self.parallel_residual, self.one_norm = parallel_residual, one_norm
        self.residual_scale = residual_scale
        self.dropout = ParallelDropout(dropout)
        self.own_bucket = False
        self.compute_dtype: torch.dtype | None = None
        self.recompute: Recompute = "none"
        self._shared_layers = SharedLayers(self)

    def forward(self, x: Tensor, **options: Unpack[BlockOptions]) -> Tensor:
        """``[batch, sequence (_local), hidden]`` to the same; options as in attention."""
        if self.recompute == "full":
            return recomputed(self._in_dtype, x, **options)
        return self._in_dtype(x, **options)

    def _in_dtype(self, x: Tensor, **options: Unpack[BlockOptions]) -> Tensor:
        if self.compute_dtype is None:
            return self._run(x, **options)
        with cast_parameters(self.modules(), self.compute_dtype):
            return self._run(x, **options)

    def _run(
        self,
        x: Tensor,
        *,
        context: AttentionContext | None = None,
        cache: AttentionCache | None = None,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
        dropout_key: int | Tensor | None = None,
        router_losses: RouterLosses | None = None,
    ) -> Tensor:
        layer = f"{self.attention.prefix}qkv"
        if dropout_key is None and self.training and self.dropout.p + self.attention.dropout.p:
            dropout_key = common_seed("dropout masks", self.tp, layer=layer, device=x.device)
        divided = self.divided_sequence(
            sequence, lambda: primitives.exchange_sizes(x, self.tp, 1, layer=layer)
        )
        sequence = WHOLE if divided is None else divided  # both layers must divide it alike
        if shared is None or self.own_bucket:
            shared = self._shared_layers.weights(self.tp, layer)
        normed = _normed(self.attention_norm, x, shared)
        attended = self.attention(
            normed,
            context=context,
            cache=cache,
            sequence=sequence,
            shared=shared,
            dropout_key=_derived(dropout_key, "weights"),
            recompute=self.recompute == "selective",
        )
        attended = self._scaled(_normed(self.attention_post_norm, attended, shared))
        residual = x + self._drop(attended, divided, _derived(dropout_key, "attention"))
        if not self.one_norm:
            normed = _normed(self.mlp_norm, x if self.parallel_residual else residual, shared)
        if isinstance(self.mlp, ParallelExperts):
            expanded = self.mlp(normed, sequence=sequence, shared=shared, losses=router_losses)
        else:
            expanded = self.mlp(normed, sequence=sequence, shared=shared)
        expanded = self._scaled(_normed(self.mlp_post_norm, expanded, shared))
        return residual + self._drop(expanded, divided, _derived(dropout_key, "mlp"))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1 else x * self.residual_scale

    def _drop(self, x: Tensor, sequence: Partition | None, key: int | Tensor | None) -> Tensor:
        if not self.training or self.dropout.p == 0:
            return x
        if sequence is None:
            whole: Tensor = self.dropout(x, key=key)
            return whole
        part: Tensor = self.dropout(x, key=key, dim=1, partition=sequence, rank=self.tp.rank)
        return part


def _normed(norm: nn.Module | None, x: Tensor, shared: SharedWeights) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = norm(x, shared=shared)
    return normed


def prepare_blocks(
    blocks: Iterable[nn.Module],
    *,
    sharded: bool,
    compute_dtype: torch.dtype | None,
    recompute: Recompute,
) -> None:
    """Tells the blocks of a model how they run in training; see their attributes.

    Args:
        sharded: FSDP2 swaps their parameters while they run, and casts them itself.
    """
    for block in blocks:
        if not isinstance(block, ParallelBlock):
            raise TypeError(f"{type(block).__name__} is no block of colrow's decoder")
        block.own_bucket = sharded or compute_dtype is not None
        block.compute_dtype = None if sharded else compute_dtype
        block.recompute = recompute


def _derived(key: int | Tensor | None, name: str) -> int | Tensor | None:
    return None if key is None else rng.derived_key(key, name)
