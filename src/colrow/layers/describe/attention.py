"""Attention layers: what they are made of on each rank."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TypeAlias

from colrow.head_partition import HeadPartition
from colrow.layers.describe.parts import (
    ColumnSpec,
    Division,
    Exchange,
    Linear,
    NormSpec,
    Part,
    RowSpec,
    SinksSpec,
    TableSpec,
)
from colrow.layers.options import RopeConfig


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention: multi-head, grouped-query or multi-query.

    Attributes:
        hidden_size, num_heads, num_kv_heads, head_dim: sizes; ``num_kv_heads`` below ``num_heads``
            is grouped-query, 1 is multi-query attention.
        qkv_bias, output_bias: which linear layers have a bias.
        rope: rotary positions, or None.
        alibi: linear position biases.
        query_norm, key_norm: norms of queries and keys: of each head's (their size is ``head_dim``)
            or of all heads' together (their size is that of the heads); of each head's with a
            weight for each head where they have ``heads``; None where there are none.
        window: how many keys back a query sees (itself included), or None for all.
        scale: what scores are multiplied by; None for ``head_dim ** -0.5``.
        softcap: scores are ``softcap * tanh(score / softcap)``; None leaves them as they are.
        sinks: each head has one more score, learned, whose weight goes nowhere.
        dropout: probability of dropping an attention weight, in training.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    rope: RopeConfig | None = None
    alibi: bool = False
    query_norm: NormSpec | None = None
    key_norm: NormSpec | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.query_norm is not None and self.query_norm.size not in (
            self.head_dim,
            self.num_heads * self.head_dim,
        ):
            raise ValueError(
                f"a norm over {self.query_norm.size} features of {self.num_heads} query heads of "
                f"{self.head_dim}: over one head's or all heads' is possible"
            )

    @property
    def key_size(self) -> int:
        """Numbers of a query and a key per head."""
        return self.head_dim

    @property
    def value_size(self) -> int:
        """Numbers of a value per head."""
        return self.head_dim

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.rope is not None

    @property
    def plain_scores(self) -> bool:
        """Whether scores are only scaled and masked, as fused kernels know them."""
        return self.softcap is None and not self.sinks

    @property
    def norms_all_heads(self) -> bool:
        """Whether a norm goes over the features of all heads, which are divided."""
        return self.query_norm is not None and self.query_norm.size != self.head_dim

    def heads(self, division: Division) -> HeadPartition:
        """Which rank computes which heads."""
        return division.heads(self.num_heads, self.num_kv_heads)

    def parts(self, division: Division) -> dict[str, Part]:
        """Its layers by name, in the order of the forward pass."""
        heads = self.heads(division)
        query, key_value = heads.query.scaled(self.head_dim), heads.key_value.scaled(self.head_dim)
        blocks = (query, key_value, key_value)
        found: dict[str, Part] = {"qkv": ColumnSpec(self.hidden_size, blocks, self.qkv_bias)}
        for name, norm, owned in (
            ("query_norm", self.query_norm, heads.query),
            ("key_norm", self.key_norm, heads.key_value),
        ):
            if norm is not None and norm.heads:
                found[name] = replace(norm, partition=owned)
            elif norm is not None and self.norms_all_heads:
                found[name] = replace(norm, partition=owned.scaled(self.head_dim))
            elif norm is not None:
                found[name] = replace(norm, by_head=True)
        if self.sinks:
            found["sinks"] = SinksSpec(heads.query)
        found["output"] = RowSpec(query, self.hidden_size, self.output_bias)
        return found

    def cached(self, division: Division, rank: int) -> int:
        """Numbers that a cache on one rank keeps of a token."""
        heads, key, value = self.cache_shape(division, rank)
        return heads * (key + value)

    def cache_shape(self, division: Division, rank: int) -> tuple[int, int, int]:
        """What a cache on one rank keeps of a token: for so many heads two runs of numbers."""
        return self.heads(division).key_value.size(rank), self.key_size, self.value_size

    def exchanges(self) -> tuple[Exchange, ...]:
        """What it sends."""
        squares = (Exchange("norms", "squares", 2),) if self.norms_all_heads else ()
        return (Exchange("qkv", "column"), *squares, Exchange("output", "row"))

    def linears(self, division: Division, rank: int) -> tuple[Linear, ...]:
        """Its matmuls with weights on one rank."""
        heads = self.heads(division)
        query, key_value = (
            part.size(rank) * self.head_dim for part in (heads.query, heads.key_value)
        )
        return (
            Linear("qkv", self.hidden_size, query + 2 * key_value, parts=3),
            Linear("output", query, self.hidden_size),
        )


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1).

    Attributes:
        hidden_size, num_heads: sizes.
        query_rank: numbers into which the hidden state is compressed for queries; 0 where queries
            are projected directly.
        kv_rank: the same for keys and values, which is what a cache keeps of a token, with
            ``rotated`` numbers with rotation that all heads share.
        nope, rotated: numbers of a query and key per head without and with rotation.
        value: numbers of a value per head.
        rope: of the numbers with rotation; None where it is not known, for sizes alone.
        scale: what scores are multiplied by; None for ``(nope + rotated) ** -0.5``.
        norm_eps: of the norms of what is compressed.
    """

    hidden_size: int
    num_heads: int
    query_rank: int
    kv_rank: int
    nope: int
    rotated: int
    value: int
    _: KW_ONLY
    window: int | None = None
    dropout: float = 0.0
    rope: RopeConfig | None = None
    scale: float | None = None
    norm_eps: float = 1e-6

    @property
    def key_size(self) -> int:
        """Numbers of a query and a key per head."""
        return self.nope + self.rotated

    @property
    def value_size(self) -> int:
        """Numbers of a value per head."""
        return self.value

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.rotated > 0

    @property
    def plain_scores(self) -> bool:
        """Whether scores are only scaled and masked, as fused kernels know them."""
        return True

    def heads(self, division: Division) -> HeadPartition:
        """Which rank computes which heads; each has keys and values of its own."""
        return division.heads(self.num_heads, self.num_heads)

    def parts(self, division: Division) -> dict[str, Part]:
        """Its layers by name, in the order of the forward pass.

        Those that compress, and the norms of what they compress, are whole on every rank. A rank
        sees its own heads alone, so that their gradients are partial.
        """
        heads, hidden = self.heads(division).query, self.hidden_size

        def compressing(outputs: int) -> TableSpec:
            return TableSpec(outputs, hidden, "partial")

        queries = heads.scaled(self.key_size)
        found: dict[str, Part]
        if self.query_rank:
            found = {
                "q_down": compressing(self.query_rank),
                "q_norm": NormSpec(self.query_rank, eps=self.norm_eps, by_head=True),
                "q_up": ColumnSpec(self.query_rank, (queries,)),
            }
        else:
            found = {"q": ColumnSpec(hidden, (queries,))}
        return found | {
            "kv_down": compressing(self.kv_rank + self.rotated),
            "kv_norm": NormSpec(self.kv_rank, eps=self.norm_eps, by_head=True),
            "kv_up": ColumnSpec(self.kv_rank, (heads.scaled(self.nope + self.value),)),
            "output": RowSpec(heads.scaled(self.value), hidden),
        }

    def cached(self, division: Division, rank: int) -> int:
        """Numbers that a cache on one rank keeps of a token."""
        heads, key, value = self.cache_shape(division, rank)
        return heads * (key + value)

    def cache_shape(self, division: Division, rank: int) -> tuple[int, int, int]:
        """As of other attention layers: what is compressed, and the rotated, on every rank."""
        return 1, self.kv_rank, self.rotated

    def linears(self, division: Division, rank: int) -> tuple[Linear, ...]:
        """Its matmuls with weights on one rank; those that compress are whole on every rank."""
        heads, hidden = self.heads(division).query.size(rank), self.hidden_size
        queries = (
            (
                Linear("q_down", hidden, self.query_rank),
                Linear("q_up", self.query_rank, heads * self.key_size),
            )
            if self.query_rank
            else (Linear("q", hidden, heads * self.key_size),)
        )
        return (
            *queries,
            Linear("kv_down", hidden, self.kv_rank + self.rotated),
            Linear("kv_up", self.kv_rank, heads * (self.nope + self.value)),
            Linear("output", heads * self.value, hidden),
        )

    def exchanges(self) -> tuple[Exchange, ...]:
        """What it sends: as other attention layers do; its input is read several times."""
        return (Exchange("qkv", "column", keeps_input=True), Exchange("output", "row"))


Attention: TypeAlias = AttentionSpec | LatentAttentionSpec
