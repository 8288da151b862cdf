"""Multi-head latent attention with its heads divided over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.layers.context import AttentionCache, AttentionContext
from colrow.layers.describe import Division, LatentAttentionSpec
from colrow.layers.described import Described
from colrow.layers.dropout import ParallelDropout
from colrow.layers.grouped_query import attend
from colrow.layers.linear import Sharded, reset_linear_
from colrow.layers.memory_saving import recomputed
from colrow.layers.norm import RMSNorm
from colrow.layers.position import KeepsTables, apply_rope, rope_frequencies
from colrow.layers.row import RowParallelLinear
from colrow.layers.shared import SharedLayers, SharedWeights
from colrow.sharding import SequenceDivision, Sharding


class LatentAttention(Sharded, KeepsTables):
    """Attention whose keys and values are made of a few numbers of each token.

    DeepSeek-AI 2024, arXiv 2405.04434, section 2.1. Each rank makes the few numbers of all tokens,
    and of these the keys and values of its own heads. A cache keeps the few numbers, on every rank;
    with it a single query is compared with them as they are, so that keys and values of earlier
    tokens are not made again (section 2.1.2, "absorbed").

    ================  ===================================  ====================================
    .                 without sequence parallelism         with sequence parallelism
    ================  ===================================  ====================================
    x, result         ``[batch, sequence, hidden]``        ``[batch, sequence_local, hidden]``
    forward sends     all-reduce                           all-gather, reduce-scatter
    backward sends    all-reduce                           all-gather, reduce-scatter
    ================  ===================================  ====================================

    Args:
        spec: the layer.
        tp: the tensor-parallel group.
        division: how heads are divided; as evenly as possible by default.
        sharding: how the sequence and the collectives are treated; the gathered input is always
            kept.
        layer_index: row of the key-value cache.
        layer: name for messages and the ledger.
    """

    def __init__(
        self,
        spec: LatentAttentionSpec,
        tp: ParallelGroup,
        *,
        division: Division | None = None,
        sharding: Sharding | None = None,
        layer_index: int = 0,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        prefix = self.prefix = f"{layer}." if layer else ""
        self.spec, self.tp, self.layer_index = spec, tp, layer_index
        self.sharding = Sharding.of(sharding)
        division = division or Division(tp.size)
        parts, heads = spec.parts(division), spec.heads(division).query
        self.heads = heads.size(tp.rank)

        def linear(name: str) -> Described | None:
            if name not in parts:
                return None
            made = Described(parts[name], tp, layer=f"{prefix}{name}", device=device, dtype=dtype)
            reset_linear_(made)
            return made

        def norm(name: str, size: int) -> RMSNorm:
            return RMSNorm(
                size,
                tp,
                eps=spec.norm_eps,
                applied_to="shard",
                layer=f"{prefix}{name}",
                device=device,
                dtype=dtype,
            )

        self.q, self.q_down = linear("q"), linear("q_down")
        self.q_norm = norm("q_norm", spec.query_rank) if spec.query_rank else None
        self.q_up = linear("q_up")
        kv_down, kv_up = linear("kv_down"), linear("kv_up")
        assert kv_down is not None and kv_up is not None
        self.kv_down, self.kv_up = kv_down, kv_up
        self.kv_norm = norm("kv_norm", spec.kv_rank)
        self.output = RowParallelLinear(
            spec.num_heads * spec.value,
            spec.hidden_size,
            tp,
            bias=False,
            sharding=self.sharding,
            partition=heads.scaled(spec.value),
            layer=f"{prefix}output",
            device=device,
            dtype=dtype,
        )
        self.dropout = ParallelDropout(spec.dropout)
        self.frequencies: Tensor | None
        self._make_tables()
        self._shared_layers = SharedLayers(self)

    def _tables(self) -> dict[str, Tensor | None]:
        rope = self.spec.rope
        return {"frequencies": None if rope is None else rope_frequencies(rope, "cpu")}

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
        """See the table of the class; arguments as for :class:`ParallelAttention`.

        Raises:
            ValueError: dropout of attention weights, which this layer does not compute.
        """
        if self.training and self.dropout.p:
            raise ValueError(
                f"{self.prefix}dropout={self.dropout.p}: latent attention drops no attention "
                "weights; set its dropout to 0"
            )
        spec, name = self.spec, f"{self.prefix}qkv"
        shared = shared or self._shared_layers.weights(self.tp, name)
        divided = self.divided_sequence(
            sequence, lambda: primitives.exchange_sizes(x, self.tp, 1, layer=name)
        )
        if divided is None:
            x = collectives.copy_to_tp(x, self.tp, layer=name)
        else:
            x = collectives.gather_from_sequence(x, self.tp, partition=divided, layer=name)
        batch, queries = x.shape[:2]
        if context is None:
            context = AttentionContext(
                queries, past=0 if cache is None else cache.length, device=x.device
            )
        q = self._queries(x, shared).view(batch, queries, self.heads, -1)
        compressed = F.linear(x, shared(self.kv_down, "weight"))
        latent, turning = compressed.split([spec.kv_rank, spec.rotated], dim=-1)
        latent = self.kv_norm(latent, shared=shared).unsqueeze(1)  # [batch, 1, keys, kv_rank]
        plain, turned = q.split([spec.nope, spec.rotated], dim=-1)
        turning = turning.unsqueeze(2)
        if spec.rope is not None and self.frequencies is not None:
            tables = context.rope(self.frequencies, spec.rope, x.dtype)
            turned, turning = (
                apply_rope(part, tables, interleaved=spec.rope.interleaved)
                for part in (turned, turning)
            )
        turning = turning.transpose(1, 2)  # [batch, 1, keys, rope]
        if cache is not None:
            latent, turning = cache.update(self.layer_index, latent, turning)
        one = cache is not None and queries == 1
        run = self._attend_to_latent if one else self._attend
        arguments = (plain, turned, latent, turning, context)
        mixed = recomputed(run, *arguments) if recompute else run(*arguments)
        mixed = mixed.transpose(1, 2).reshape(batch, queries, -1)
        result: Tensor = self.output(mixed, sequence=sequence, shared=shared)
        return result

    def _queries(self, x: Tensor, shared: SharedWeights) -> Tensor:
        """``[batch, queries, heads_local * (nope + rope)]``."""
        if self.q_down is None or self.q_norm is None or self.q_up is None:
            assert self.q is not None
            return F.linear(x, self.q.weight)
        few = F.linear(x, shared(self.q_down, "weight"))
        return F.linear(self.q_norm(few, shared=shared), self.q_up.weight)

    @property
    def _scale(self) -> float:
        return self.spec.key_size**-0.5 if self.spec.scale is None else self.spec.scale

    def _attend(
        self,
        plain: Tensor,
        turned: Tensor,
        latent: Tensor,
        turning: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        """With keys and values of this rank's heads; ``[batch, heads_local, queries, value]``.

        Args:
            plain, turned: queries without and with rotation, each
                ``[batch, queries, heads_local, ...]``.
            latent, turning: the numbers of each token, ``[batch, 1, keys, ...]``.
        """
        spec, (batch, _, keys, _) = self.spec, latent.shape
        made = F.linear(latent[:, 0], self.kv_up.weight).view(batch, keys, self.heads, -1)
        k, v = made.transpose(1, 2).split([spec.nope, spec.value], dim=-1)
        k = torch.cat([k, turning.expand(-1, self.heads, -1, -1)], dim=-1)
        q = torch.cat([plain, turned], dim=-1).transpose(1, 2)
        return attend(q, k, v, context.mask(spec.window), self._scale)

    def _attend_to_latent(
        self,
        plain: Tensor,
        turned: Tensor,
        latent: Tensor,
        turning: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        """The same without keys and values: what makes them is applied to queries and sums."""
        spec = self.spec
        to_keys, to_values = self.kv_up.weight.view(self.heads, -1, spec.kv_rank).split(
            [spec.nope, spec.value], dim=1
        )
        absorbed = plain.transpose(1, 2) @ to_keys  # [batch, heads_local, queries, kv_rank]
        q = torch.cat([absorbed, turned.transpose(1, 2)], dim=-1)
        k = torch.cat([latent, turning], dim=-1)
        sums = attend(q, k, latent, context.mask(spec.window), self._scale)
        mixed: Tensor = sums @ to_values.transpose(1, 2)
        return mixed

    def extra_repr(self) -> str:
        """Heads held and in all."""
        spec = self.spec
        return (
            f"heads={self.heads} of {spec.num_heads}, query_rank={spec.query_rank}, "
            f"kv_rank={spec.kv_rank}"
        )
