"""The shape of a decoder, and every parameter that follows from it. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from colrow.layers.options import Activation, Norm, Position, RopeConfig
from colrow.models.config_limits import check_fields
from colrow.partition import HeadPartition, Partition, ShardSpec, parse_shares


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        family: name of the family whose weight names it uses, see :mod:`colrow.models.families`.
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: sizes;
            ``num_kv_heads`` below ``num_heads`` is grouped-query, 1 is multi-query attention.
        max_positions: longest sequence; binding for learned positions.
        norm, norm_eps: kind of normalisation and its epsilon.
        activation, gated: of the MLP; gated is SwiGLU's ``act(gate) * up``.
        position, rope: how positions enter.
        parallel_residual: attention and MLP both read the block's input and are added together.
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        qk_norm: RMS norm on each head's query and key.
        embedding_norm: a norm right after the embedding.
        tie_embeddings: the head uses the embedding's weight.
        windows: per layer, how many keys back a query sees (itself included), or None for all.
        embedding_dropout, attention_dropout, residual_dropout: probabilities, in training.
        initializer_range: standard deviation of initial weights.
        scaled_residual_init: weights that write to the residual stream start smaller by
            ``sqrt(2 * num_layers)`` (Radford et al. 2019, section 2.3).
        freeze_padding: the padding token's embedding gets no gradient.
        bos_token_id, eos_token_ids, pad_token_id: special tokens, where known.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    position: Position = "rope"
    rope: RopeConfig | None = None
    parallel_residual: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_norm: bool = False
    tie_embeddings: bool = False
    windows: tuple[int | None, ...] = field(default=())
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    initializer_range: float = 0.02
    scaled_residual_init: bool = False
    freeze_padding: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(vars(self))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if (self.position == "rope") != (self.rope is not None):
            raise ValueError(f"position={self.position!r} and rope={self.rope} do not go together")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")

    def window(self, layer: int) -> int | None:
        """How many keys back a query of this layer sees, or None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def has_norm_bias(self) -> bool:
        """LayerNorm has one, RMSNorm has none."""
        return self.norm == "layernorm"


@dataclass(frozen=True)
class Layout:
    """How a model's dimensions are divided over a tensor-parallel group.

    Attributes:
        heads: attention heads.
        ffn: hidden features of the MLP.
        vocab: rows of the embedding and of the head.
    """

    heads: HeadPartition
    ffn: Partition
    vocab: Partition

    @classmethod
    def create(
        cls, config: ModelConfig, tp_size: int, tensor_split: str | Sequence[float] | None = None
    ) -> Layout:
        """As even as possible, or in the ratio of ``tensor_split``.

        Args:
            tensor_split: one share for each rank, on any positive scale: "2,1" or "0.5,0.3,0.2".
                Query heads (with the KV heads that they read), FFN features and vocabulary rows are
                divided in this ratio, each to the nearest whole one.

        Raises:
            ValueError: when there are more ranks than query heads, FFN features or vocabulary; a
                split without one share for each rank, or that leaves a rank without one of these.
        """
        for name, length in (("ffn_size", config.ffn_size), ("vocab_size", config.vocab_size)):
            if length < tp_size:
                raise ValueError(
                    f"{name}={length} cannot be split over {tp_size} ranks; use a tensor-parallel "
                    f"size of at most {length}"
                )
        if not tensor_split:
            heads = HeadPartition.create(config.num_heads, config.num_kv_heads, tp_size)
            ffn = Partition.even(config.ffn_size, tp_size)
            return cls(heads, ffn, Partition.even(config.vocab_size, tp_size))
        shares = parse_shares(tensor_split, "tensor split")
        if len(shares) != tp_size:
            raise ValueError(
                f"the tensor split {_text(shares)} has {len(shares)} "
                f"number{'s' if len(shares) > 1 else ''} for a tensor-parallel size of {tp_size}: "
                "give one for each rank, or leave it out"
            )
        for what, length in (
            ("query heads", config.num_heads),
            ("FFN features", config.ffn_size),
            ("vocabulary rows", config.vocab_size),
        ):
            sizes = Partition.ratio(length, shares).sizes
            if 0 in sizes:
                raise ValueError(
                    f"the tensor split {_text(shares)} gives the ranks {_text(sizes)} of the "
                    f"model's {length} {what}, none to rank {sizes.index(0)}: every rank needs at "
                    "least one, so give that rank a larger share or take fewer ranks"
                )
        return cls(
            HeadPartition.create(config.num_heads, config.num_kv_heads, tp_size, weights=shares),
            Partition.ratio(config.ffn_size, shares),
            Partition.ratio(config.vocab_size, shares),
        )


def _text(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def parameter_specs(config: ModelConfig, layout: Layout) -> dict[str, ShardSpec]:
    """Every parameter of the decoder, under colrow's names, in the order of the forward pass.

    A tied head is not listed: it is the embedding.
    """
    hidden, whole = config.hidden_size, ShardSpec.replicated
    specs: dict[str, ShardSpec] = {}

    def norm(name: str, size: int = hidden, bias: bool = config.has_norm_bias) -> None:
        specs[f"{name}.weight"] = whole(size)
        if bias:
            specs[f"{name}.bias"] = whole(size)

    def column(name: str, blocks: tuple[Partition, ...], bias: bool) -> None:
        out = sum(block.length for block in blocks)
        specs[f"{name}.weight"] = ShardSpec((out, hidden), 0, blocks)
        if bias:
            specs[f"{name}.bias"] = ShardSpec((out,), 0, blocks)

    def row(name: str, partition: Partition, bias: bool) -> None:
        specs[f"{name}.weight"] = ShardSpec((hidden, partition.length), 1, (partition,))
        if bias:
            specs[f"{name}.bias"] = whole(hidden)

    query = layout.heads.query.scaled(config.head_dim)
    key_value = layout.heads.key_value.scaled(config.head_dim)
    column("embedding", (layout.vocab,), bias=False)
    if config.position == "learned":
        specs["positions.weight"] = whole(config.max_positions, hidden)
    if config.embedding_norm:
        norm("embedding_norm")
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        norm(f"{block}.attention_norm")
        column(f"{block}.attention.qkv", (query, key_value, key_value), config.qkv_bias)
        if config.qk_norm:
            norm(f"{block}.attention.query_norm", config.head_dim, bias=False)
            norm(f"{block}.attention.key_norm", config.head_dim, bias=False)
        row(f"{block}.attention.output", query, config.output_bias)
        norm(f"{block}.mlp_norm")
        ffn = (layout.ffn, layout.ffn) if config.gated else (layout.ffn,)
        column(f"{block}.mlp.up", ffn, config.mlp_bias)
        row(f"{block}.mlp.down", layout.ffn, config.mlp_bias)
    norm("norm")
    if not config.tie_embeddings:
        column("head", (layout.vocab,), bias=False)
    return specs


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the whole model; a tied head counts once."""
    total = 0
    for spec in parameter_specs(config, Layout.create(config, 1)).values():
        size = 1
        for length in spec.shape:
            size *= length
        total += size
    return total
