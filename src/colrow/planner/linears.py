"""The linear layers of a block on one rank. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from colrow.layers.describe import Division
from colrow.planner.model import ModelShape


@dataclass(frozen=True)
class Linear:
    """One matmul with a weight: ``[tokens, inputs] x [inputs, outputs]`` on this rank.

    Attributes:
        experts: how many such layers there are, of which a token passes through some.
        parts: of how many layers of a published model it is made; each has an adapter of its own.
    """

    name: str
    inputs: int
    outputs: int
    experts: int = 1
    parts: int = 1


def linears(model: ModelShape, division: Division, rank: int) -> tuple[Linear, ...]:
    """The linear layers of a block on one rank."""
    config = model.config
    query = division.heads.query.size(rank) * config.head_dim
    key_value = division.heads.key_value.size(rank) * config.head_dim
    ffn = division.ffn.size(rank)
    hidden = config.hidden_size
    width = 2 if config.gated else 1
    attention: tuple[Linear, ...] = (
        Linear("attention.qkv", hidden, query + 2 * key_value, parts=3),
        Linear("attention.output", query, hidden),
    )
    if model.latent:
        local = model.latent.linears(hidden, division.heads.query.size(rank))
        attention = tuple(Linear(*layer) for layer in local)
    shared: tuple[Linear, ...] = ()
    if part := model.shared_ffn_of_rank(division.vocab.parts):
        shared = (
            Linear("shared.up", hidden, width * part, parts=width),
            Linear("shared.down", part, hidden),
        )
    return (
        *attention,
        *shared,
        Linear("mlp.up", hidden, width * ffn, model.experts, width),
        Linear("mlp.down", ffn, hidden, model.experts),
    )


def fullest_rank(division: Division) -> int:
    """The tensor-parallel rank that the others wait for: the one with most attention heads."""
    ranks = range(division.vocab.parts)
    return max(ranks, key=lambda r: (division.heads.query.size(r), division.ffn.size(r)))
