"""Attention with its heads divided over ranks: multi-head, grouped-query and multi-query."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.comm import primitives
from colrow.comm.agreement import common_seed
from colrow.comm.group import ParallelGroup
from colrow.head_partition import HeadPartition
from colrow.layers.column import QKVParallelLinear
from colrow.layers.context import AttentionCache, AttentionContext
from colrow.layers.describe import NormSpec
from colrow.layers.dropout import ParallelDropout
from colrow.layers.grouped_query import attend, padded_groups
from colrow.layers.head_norm import DividedRMSNorm, head_norm, normed_together
from colrow.layers.linear import Sharded
from colrow.layers.memory_saving import recomputed
from colrow.layers.options import RopeConfig
from colrow.layers.position import KeepsTables, alibi_slopes, apply_rope, rope_frequencies
from colrow.layers.row import RowParallelLinear
from colrow.layers.scores import Sinks, attend_written_out
from colrow.layers.shared import SharedLayers, SharedWeights
from colrow.sharding import SequenceDivision, Sharding


class ParallelAttention(Sharded, KeepsTables):
    """Self-attention; this rank computes its query heads and the KV heads that they read.

    ================  ===================================  ====================================
    .                 without sequence parallelism         with sequence parallelism
    ================  ===================================  ====================================
    x, result         ``[batch, sequence, hidden]``        ``[batch, sequence_local, hidden]``
    forward sends     all-reduce                           all-gather, reduce-scatter
    backward sends    all-reduce                           all-gather, reduce-scatter
    ================  ===================================  ====================================

    Args:
        hidden_size: size of the model.
        heads: how query and KV heads are divided; any head counts at any tp size up to the number
            of query heads. KV heads that several ranks hold have their gradients summed.
        head_dim: size of a head.
        tp: the tensor-parallel group.
        rope: rotary positions, or None.
        alibi: linear position biases (Press et al. 2021).
        qkv_bias, output_bias: whether these projections have biases.
        query_norm, key_norm: RMS norms of queries and keys, or None. Of size ``head_dim`` they are
            of each head's features. Of the size of all heads they are of all heads' features
            together, of which each rank has some: the ranks add up their squares, two numbers for
            each token in fp32 (fp64 for fp64), once in forward and once in backward.
        scale: what scores are multiplied by; ``head_dim ** -0.5`` by default.
        softcap: scores are ``softcap * tanh(score / softcap)`` before they are masked (Gemma 2).
        sinks: each head has one more score, learned, whose weight goes nowhere (gpt-oss).
        window: how many keys back a query sees, itself included; None for all.
        dropout: probability of dropping an attention weight in training. Its mask follows the
            global head index. With dropout, a soft cap or sinks attention is computed outside the
            fused kernel, with every score in memory: see
            :func:`colrow.layers.scores.attend_written_out`.
        sequence_parallel: whether input and result are shards of the sequence; the heads always
            see the whole of it.
        sharding: this and more, see :class:`colrow.Sharding`.
        layer_index: row of the key-value cache.
        layer: name for messages and the ledger.

    Raises:
        ValueError: heads that are divided over another number of ranks; one norm of the two, or
            one that is no RMS norm; what the two linear layers refuse.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: HeadPartition,
        head_dim: int,
        tp: ParallelGroup,
        *,
        rope: RopeConfig | None = None,
        alibi: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
        query_norm: NormSpec | None = None,
        key_norm: NormSpec | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
        sequence_parallel: bool = False,
        sharding: Sharding | None = None,
        layer_index: int = 0,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        prefix = self.prefix = f"{layer}." if layer else ""
        self.heads, self.head_dim, self.tp = heads, head_dim, tp
        self.rope, self.window, self.layer_index = rope, window, layer_index
        self.sharding = Sharding.of(sharding, sequence_parallel)
        self.scale, self.softcap = scale, softcap
        self.qkv = QKVParallelLinear(
            hidden_size,
            heads,
            head_dim,
            tp,
            bias=qkv_bias,
            sharding=self.sharding,
            layer=f"{prefix}qkv",
            device=device,
            dtype=dtype,
        )
        self.q_heads, self.kv_heads = heads.query.size(tp.rank), heads.key_value.size(tp.rank)
        self.runs = heads.runs(tp.rank)
        self.output = RowParallelLinear(
            heads.query.length * head_dim,
            hidden_size,
            tp,
            bias=output_bias,
            sharding=self.sharding,
            partition=heads.query.scaled(head_dim),
            layer=f"{prefix}output",
            device=device,
            dtype=dtype,
        )
        self.sinks = None
        if sinks:
            self.sinks = Sinks(heads.query, tp, layer=f"{prefix}sinks", device=device, dtype=dtype)
        self.query_norm = self.key_norm = None
        if (query_norm is None) != (key_norm is None):
            raise ValueError(f"{layer}: queries and keys have norms both, or neither has one")
        if query_norm is not None and key_norm is not None:
            self.query_norm, self.key_norm = (
                head_norm(
                    norm,
                    tp,
                    part,
                    over_all=query_norm.size != head_dim,  # of one KV head both have the same size
                    layer=f"{prefix}{name}",
                    device=device,
                    dtype=dtype,
                )
                for name, norm, part in (
                    ("query_norm", query_norm, heads.query),
                    ("key_norm", key_norm, heads.key_value),
                )
            )
        self.dropout = ParallelDropout(dropout)
        self.alibi = alibi
        self.slopes: Tensor | None
        self.frequencies: Tensor | None
        self.padded: Tensor
        self.unpadded: Tensor
        self._make_tables()
        self._shared_layers = SharedLayers(self)

    def _tables(self) -> dict[str, Tensor | None]:
        slopes = None
        if self.alibi:
            start, stop = self.heads.query.bounds[self.tp.rank]
            slopes = alibi_slopes(self.heads.query.length, "cpu")[start:stop]
        groups = padded_groups(self.runs) if len(self.runs) > 1 else (None, None)
        padded, unpadded = (
            None if places is None else torch.tensor(places, device="cpu") for places in groups
        )
        return {
            "padded": padded,
            "unpadded": unpadded,
            "slopes": slopes,
            "frequencies": None if self.rope is None else rope_frequencies(self.rope, "cpu"),
        }

    def forward(
        self,
        x: Tensor,
        *,
        context: AttentionContext | None = None,
        cache: AttentionCache | None = None,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
        dropout_key: int | Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """See the table of the class.

        Args:
            context: positions and masks; by default a plain causal sequence from position 0.
            cache: keys and values of earlier positions, to be extended.
            sequence, shared: as in the linear layers.
            dropout_key: which dropout mask, see :class:`ParallelDropout`. By default the ranks draw
                it from torch's CPU generator and compare it (an all-reduce of 16 bytes).
            recompute: keep queries, keys and values for backward, and nothing of what is computed
                between them and the output projection.

        Raises:
            ValueError: ALiBi with explicit positions and a cache; ranks that drew different keys.
        """
        drops = self.training and self.dropout.p > 0
        if dropout_key is None and drops:
            dropout_key = common_seed(
                "dropout masks", self.tp, layer=self.qkv.layer, device=x.device
            )
        if sequence is None and self.sequence_parallel:  # both linear layers must divide it alike
            sequence = primitives.exchange_sizes(x, self.tp, 1, layer=self.qkv.layer)
        shared = shared or self._shared_layers.weights(self.tp, self.qkv.layer)
        fused = self.qkv(x, sequence=sequence, shared=shared)
        batch, queries = fused.shape[0], fused.shape[1]
        if context is None:
            past = 0 if cache is None else cache.length
            context = AttentionContext(queries, past=past, device=x.device)
        qk, v = fused.view(batch, queries, -1, self.head_dim).split(
            [self.q_heads + self.kv_heads, self.kv_heads], dim=2
        )  # each [batch, queries, heads_local, head_dim]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = qk.split([self.q_heads, self.kv_heads], dim=2)
            qk = torch.cat(self._normed(q, k, shared), dim=2)
        if self.rope is not None and self.frequencies is not None:
            tables = context.rope(self.frequencies, self.rope, qk.dtype)
            qk = apply_rope(qk, tables, interleaved=self.rope.interleaved)
        q, k = qk.split([self.q_heads, self.kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer_index, k, v)
        attend: Callable[..., Tensor] = self._attend
        arguments: tuple[object, ...] = (q, k, v, context)
        if drops or self.softcap is not None or self.sinks is not None:
            attend = self._attend_written_out
            sinks = None if self.sinks is None else self.sinks.weight
            arguments = (*arguments, sinks, dropout_key if drops else None)
        mixed = recomputed(attend, *arguments) if recompute else attend(*arguments)
        mixed = mixed.transpose(1, 2).reshape(batch, queries, -1)  # [batch, queries, q_local * dim]
        result: Tensor = self.output(mixed, sequence=sequence, shared=shared)
        return result

    def _normed(self, q: Tensor, k: Tensor, shared: SharedWeights) -> tuple[Tensor, Tensor]:
        """Queries and keys, ``[batch, queries, heads_local, head_dim]``, behind their norms."""
        first, second = self.query_norm, self.key_norm
        if isinstance(first, DividedRMSNorm) and isinstance(second, DividedRMSNorm):
            name = f"{self.prefix}norms"
            q, k = normed_together((first, second), (q, k), shared, layer=name)
            return q, k
        assert first is not None and second is not None
        return first(q, shared=shared), second(k, shared=shared)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Fused attention, one call for each run of KV heads that serve equally many queries."""
        mask = self._bias(context, q.dtype)
        if q.shape[2] == 1 and len(self.runs) > 1 and (mask is None or mask.shape[1] == 1):
            return self._attend_padded(q, k, v, mask)
        parts = []
        for (q0, q1), (kv0, kv1) in self.runs:
            bias = mask[:, q0:q1] if mask is not None and mask.shape[1] > 1 else mask
            parts.append(attend(q[:, q0:q1], k[:, kv0:kv1], v[:, kv0:kv1], bias, self.scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend_padded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """One query: as one call, in which every KV head serves as many heads as the fullest."""
        batch, _, _, dim = q.shape
        groups = q.index_select(1, self.padded).view(batch, self.kv_heads, -1, dim)
        mixed = F.scaled_dot_product_attention(groups, k, v, mask, scale=self.scale).view(
            batch, -1, 1, dim
        )
        return mixed.index_select(1, self.unpadded)

    def _attend_written_out(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: AttentionContext,
        sinks: Tensor | None,
        key: int | Tensor | None,
    ) -> Tensor:
        """With every score in memory; a dropout mask follows the global head index."""
        bias = self._bias(context, q.dtype)
        drop = None
        if key is not None:
            drop = partial(
                self.dropout, key=key, dim=1, partition=self.heads.query, rank=self.tp.rank
            )
        return attend_written_out(
            q,
            k,
            v,
            self.runs,
            context.full_mask(self.window) if bias is None else bias,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            softcap=self.softcap,
            sinks=sinks,
            drop=drop,
        )

    def _bias(self, context: AttentionContext, dtype: torch.dtype) -> Tensor | None:
        """Mask (bool), or ALiBi bias with the mask in it, or None for plain causal attention."""
        if self.slopes is None:
            return context.mask(self.window)
        return context.alibi(self.slopes, self.heads.query, self.window, dtype)

    def extra_repr(self) -> str:
        """Heads held and in all."""
        return (
            f"q_heads={self.q_heads} of {self.heads.query.length}, "
            f"kv_heads={self.kv_heads} of {self.heads.key_value.length}, head_dim={self.head_dim}"
        )
