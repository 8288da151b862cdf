"""The model as the planner sees it: a decoder's configuration, and experts where it has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from colrow.layers.describe import Division
from colrow.models.config import ModelConfig, parameter_specs


@dataclass(frozen=True)
class Shard:
    """Elements that one tensor-parallel rank holds.

    Attributes:
        embedding: with positions and the norm after it.
        block: of one block, without its experts.
        experts: of all experts of a block, each divided like an MLP.
        head: final norm and, unless tied, the head.
        tied: of the embedding, when the head uses it too; 0 otherwise.
    """

    embedding: int
    block: int
    experts: int
    head: int
    tied: int


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1).

    Attributes:
        query_rank: numbers into which the hidden state is compressed for queries; 0 where queries
            are projected directly.
        kv_rank: the same for keys and values, which is what a cache keeps of a token, with
            ``rope`` rotated numbers that all heads share.
        nope, rope: numbers of a query and key per head without and with rotation.
        value: numbers of a value per head.
    """

    query_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int

    def linears(self, hidden: int, heads: int) -> tuple[tuple[str, int, int], ...]:
        """``(name, inputs, outputs)`` of its linear layers with so many heads on a rank."""
        key = self.nope + self.rope
        queries = (
            (
                ("attention.q_down", hidden, self.query_rank),
                ("attention.q_up", self.query_rank, heads * key),
            )
            if self.query_rank
            else (("attention.q", hidden, heads * key),)
        )
        return (
            *queries,
            ("attention.kv_down", hidden, self.kv_rank + self.rope),
            ("attention.kv_up", self.kv_rank, heads * (self.nope + self.value)),
            ("attention.output", heads * self.value, hidden),
        )

    def parameters(self, hidden: int, heads: int) -> int:
        """Of its linear layers with so many heads, and of the two norms between them."""
        matrices = sum(inputs * outputs for _, inputs, outputs in self.linears(hidden, heads))
        return matrices + self.query_rank + self.kv_rank


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer, dense or a mixture of experts.

    Attributes:
        name: as shown.
        config: the decoder. With experts, ``config.ffn_size`` is the width of one expert.
        experts: experts per layer; 1 is a dense model.
        active_experts: experts that each token passes through.
        shared_ffn: width of an MLP beside the experts through which every token passes; 0: none.
        dense_layers: how many of the first layers have one MLP, of width ``dense_ffn``, in place of
            experts.
        dense_ffn: its width.
        latent: latent attention in place of the configuration's.
        source: where the shape was published.
    """

    name: str
    config: ModelConfig
    experts: int = 1
    active_experts: int = 1
    source: str = ""
    shared_ffn: int = 0
    dense_layers: int = 0
    dense_ffn: int = 0
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.active_experts <= self.experts:
            raise ValueError(
                f"{self.active_experts} active of {self.experts} experts: must be between 1 and all"
            )

    @cached_property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self._parameters(self.experts)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token meets: as ``parameters`` with only the active experts."""
        return self._parameters(self.active_experts)

    def _parameters(self, experts: int) -> int:
        (whole,) = self.shards(1)
        layers, dense = self.config.num_layers, self.dense_layers
        total = whole.embedding + whole.head
        total += (layers - dense) * (whole.block + whole.experts // self.experts * experts)
        if dense:
            total += dense * self.dense_part.shards(1)[0].block
        return total

    @cached_property
    def dense_part(self) -> ModelShape:
        """The model as its layers without experts are."""
        config = replace(self.config, ffn_size=self.dense_ffn or self.config.ffn_size)
        return ModelShape(f"{self.name}, dense layers", config, latent=self.latent)

    @property
    def key_size(self) -> int:
        """Numbers of a query and a key per head."""
        return self.latent.nope + self.latent.rope if self.latent else self.config.head_dim

    @property
    def value_size(self) -> int:
        """Numbers of a value per head."""
        return self.latent.value if self.latent else self.config.head_dim

    def shared_ffn_of_rank(self, tp: int) -> int:
        """Width of the shared MLP on one of ``tp`` ranks, the fullest; 0 where there is none."""
        return -(-self.shared_ffn // tp)

    def key_value_numbers(self, division: Division, rank: int) -> int:
        """Of a token's keys and values together on a rank, as attention reads them.

        With latent attention every query head has its own.
        """
        heads = division.heads.query if self.latent else division.heads.key_value
        return heads.size(rank) * (self.key_size + self.value_size)

    def division(self, tp: int, weights: tuple[float, ...] = ()) -> Division:
        """How a tensor-parallel group divides it, see :class:`colrow.models.config.Layout`."""
        return _division(self, tp, weights)

    def shards(self, tp: int, weights: tuple[float, ...] = ()) -> tuple[Shard, ...]:
        """What each tensor-parallel rank holds."""
        return _shards(self, tp, weights)

    @cached_property
    def tensors_per_block(self) -> int:
        """Parameter tensors of one block."""
        one_layer = replace(self.config, num_layers=1, windows=())
        names = parameter_specs(one_layer, self.division(1))
        block = sum(name.startswith("blocks.") for name in names)
        mlp = sum(".mlp." in name for name in names)
        return block if self.experts == 1 else block + (self.experts - 1) * mlp + 1


@lru_cache(maxsize=256)
def _division(model: ModelShape, tp: int, weights: tuple[float, ...]) -> Division:
    return Division.create(model.config, tp, weights)


@lru_cache(maxsize=256)
def _shards(model: ModelShape, tp: int, weights: tuple[float, ...]) -> tuple[Shard, ...]:
    division = _division(model, tp, weights)
    config = model.config
    one_layer = replace(config, num_layers=1, windows=())
    parts = [{"embedding": 0, "block": 0, "experts": 0, "head": 0} for _ in range(tp)]
    for name, spec in parameter_specs(one_layer, division).items():
        if model.latent and ".attention." in name:
            continue
        head = name.startswith(("norm", "head"))
        place = "block" if name.startswith("blocks.") else "head" if head else "embedding"
        if model.experts > 1 and ".mlp." in name:
            place = "experts"
        for rank in range(tp):
            parts[rank][place] += math.prod(spec.local_shape(rank))
    matrices = 3 if config.gated else 2
    found = []
    for rank, part in enumerate(parts):
        block = part["block"]
        if model.latent:
            block += model.latent.parameters(config.hidden_size, division.heads.query.size(rank))
        if model.experts > 1:
            block += config.hidden_size * model.experts  # the router
        block += matrices * config.hidden_size * model.shared_ffn_of_rank(tp)
        tied = division.vocab.size(rank) * config.hidden_size if config.tie_embeddings else 0
        found.append(
            Shard(part["embedding"], block, part["experts"] * model.experts, part["head"], tied)
        )
    return tuple(found)
