"""A decoder, described: its blocks and what stands around them. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from colrow.layers.describe import (
    AttentionSpec,
    BlockSpec,
    ColumnSpec,
    Division,
    EmbeddingSpec,
    ExpertsSpec,
    NormSpec,
    ParameterSpec,
    Part,
    TableSpec,
    parameters_of,
)
from colrow.layers.options import RopeConfig
from colrow.partition import Partition, parse_shares


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Families make one from a checkpoint's configuration (:mod:`colrow.models.families`), by
    :func:`colrow.models.compose.decoder` where all blocks are alike or nearly so.

    Attributes:
        family: name of the family whose weight names it uses.
        vocab_size: rows of the embedding and of the head.
        blocks: one description for each layer.
        max_positions: longest sequence; binding for learned positions.
        norm: in front of the head.
        positions: "learned" for a vector for each position that is added to the token's, else None.
        embedding_scale: what the token's vector is multiplied by.
        embedding_norm: a norm right after the embedding, or None.
        logit_scale: what the head's result is multiplied by.
        logit_softcap: logits are then ``cap * tanh(logit / cap)``; None leaves them as they are.
        tie_embeddings: the head uses the embedding's weight.
        embedding_dropout: probability, in training.
        initializer_range: standard deviation of initial weights.
        scaled_residual_init: weights that write to the residual stream start smaller by
            ``sqrt(2 * num_layers)`` (Radford et al. 2019, section 2.3).
        freeze_padding: the padding token's embedding gets no gradient.
        router_balance, router_z: coefficients of the losses on the routers of experts, see
            :class:`colrow.layers.router.RouterLosses`.
        bos_token_id, eos_token_ids, pad_token_id: special tokens, where known.
    """

    family: str
    vocab_size: int
    blocks: tuple[BlockSpec, ...]
    max_positions: int
    norm: NormSpec
    positions: Literal["learned"] | None = None
    embedding_scale: float = 1.0
    embedding_norm: NormSpec | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02
    scaled_residual_init: bool = False
    freeze_padding: bool = False
    router_balance: float = 0.0
    router_z: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())
    pad_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.norm.size

    @property
    def longest(self) -> int | None:
        """The longest sequence that can be computed; None where positions go on for ever."""
        return self.max_positions if self.positions == "learned" else None

    @property
    def short_texts(self) -> int | None:
        """The longest text that LongRoPE's factors for short ones are of; None without these."""
        ropes = {block.attention.rope for block in self.blocks if block.attention.rotates}
        lengths = [
            rope.original_max_positions
            for rope in ropes
            if isinstance(rope, RopeConfig)
            and rope.scaling == "longrope"
            and rope.short_factors != rope.long_factors
        ]
        return min(lengths, default=None)

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return self.embedding_dropout > 0 or any(
            block.dropout > 0 or block.attention.dropout > 0 for block in set(self.blocks)
        )

    def parts(self, division: Division) -> dict[str, Part]:
        """All layers by colrow's names, in the order of the forward pass.

        A tied head is not listed: it is the embedding.
        """
        vocab = division.of(self.vocab_size)
        found: dict[str, Part] = {"embedding": EmbeddingSpec(vocab, self.hidden_size)}
        if self.positions is not None:
            found["positions"] = TableSpec(self.max_positions, self.hidden_size)
        if self.embedding_norm is not None:
            found["embedding_norm"] = self.embedding_norm
        for index, block in enumerate(self.blocks):
            for name, part in _parts_of(block, division).items():
                found[f"blocks.{index}.{name}"] = part
        found["norm"] = self.norm
        if not self.tie_embeddings:
            found["head"] = ColumnSpec(self.hidden_size, (vocab,))
        return found

    def parameters(self, division: Division) -> dict[str, ParameterSpec]:
        """Every parameter under colrow's names, in the order of the forward pass."""
        return parameters_of(self.parts(division))

    def divide(self, tp_size: int, tensor_split: str | Sequence[float] | None = None) -> Division:
        """As even as possible, or in the ratio of ``tensor_split``.

        Args:
            tensor_split: one share for each rank, on any positive scale: "2,1" or "0.5,0.3,0.2".
                Query heads (with the KV heads that they read), FFN features and vocabulary rows are
                divided in this ratio, each to the nearest whole one.

        Raises:
            ValueError: when there are more ranks than query heads, FFN features or vocabulary; a
                split without one share for each rank, or that leaves a rank without one of these.
        """
        shares = parse_shares(tensor_split, "tensor split") if tensor_split else ()
        if shares and len(shares) != tp_size:
            raise ValueError(
                f"the tensor split {_text(shares)} has {len(shares)} "
                f"number{'s' if len(shares) > 1 else ''} for a tensor-parallel size of {tp_size}: "
                "give one for each rank, or leave it out"
            )
        for what, length in self._divided():
            if length < tp_size and not shares and what != "query heads":
                raise ValueError(
                    f"the model's {length} {what} cannot be split over {tp_size} ranks; use a "
                    f"tensor-parallel size of at most {length}"
                )
            sizes = Partition.ratio(length, shares).sizes if shares else (1,)
            if 0 in sizes:
                raise ValueError(
                    f"the tensor split {_text(shares)} gives the ranks {_text(sizes)} of the "
                    f"model's {length} {what}, none to rank {sizes.index(0)}: every rank needs at "
                    "least one, so give that rank a larger share or take fewer ranks"
                )
        division = Division(tp_size, shares)
        for block in dict.fromkeys(self.blocks):
            block.attention.heads(division)
        return division

    def _divided(self) -> list[tuple[str, int]]:
        """What is divided, and how much there is of it."""
        found: list[tuple[str, int]] = []
        for block in self.blocks:
            mlp = block.mlp
            both = (mlp.expert, mlp.shared) if isinstance(mlp, ExpertsSpec) else (mlp,)
            found.append(("query heads", block.attention.num_heads))
            found += [("FFN features", one.ffn_size) for one in both if one is not None]
        return list(dict.fromkeys([*found, ("vocabulary rows", self.vocab_size)]))


@lru_cache(maxsize=1024)
def _parts_of(block: BlockSpec, division: Division) -> dict[str, Part]:
    return block.parts(division)


def _text(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the whole model; a tied head counts once.

    What no gradient changes is none, as in transformers, which holds it in buffers.
    """
    parameters = config.parameters(Division(1)).values()
    return sum(parameter.elements for parameter in parameters if parameter.trained)


def common_attention(config: ModelConfig) -> AttentionSpec:
    """The attention of the first block, whose heads all blocks have.

    Raises:
        ValueError: blocks whose heads differ in number or size, or are of another kind.
    """
    found = [attention_of(block) for block in dict.fromkeys(config.blocks)]
    if len({(each.num_heads, each.num_kv_heads, each.head_dim) for each in found}) > 1:
        raise ValueError(f"the blocks of this {config.family} model have heads of several kinds")
    return found[0]


def attention_of(block: BlockSpec) -> AttentionSpec:
    """The block's attention, where keys and values are cached by head.

    Raises:
        ValueError: for another kind.
    """
    if not isinstance(block.attention, AttentionSpec):
        raise ValueError(f"{type(block.attention).__name__} has no keys and values by head")
    return block.attention
