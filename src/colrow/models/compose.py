"""Decoders whose blocks are alike, or differ in windows and rotary positions alone. No torch.

The numbers and choices of such a decoder are a flat list of fields, as configuration files have
them: :func:`decoder` composes its blocks from them, and :func:`fields_of` is the way back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from colrow.layers.describe import (
    Attention,
    AttentionSpec,
    BlockSpec,
    ExpertsSpec,
    FeedForward,
    LatentAttentionSpec,
    MLPSpec,
    NormSpec,
    Routing,
)
from colrow.layers.options import Activation, ClampedGate, Norm, Position, RopeConfig
from colrow.models.config import ModelConfig
from colrow.models.config_limits import check_fields

Norms = Literal["before", "after", "around"]
"""Where a block's norms stand: in front of its layers, behind them, or both."""
QKNorm = Literal["none", "each_head", "all_heads", "by_head"]
"""Of queries and keys: of each head, of all together, or of each with a weight of its own."""


def decoder(
    *,
    family: str,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    ffn_size: int,
    max_positions: int,
    norm: Norm = "rmsnorm",
    norm_eps: float = 1e-5,
    norm_centred: bool = False,
    norm_wide: bool = False,
    norm_bias: bool = True,
    norms: Norms = "before",
    activation: Activation = "silu",
    gated: bool = True,
    position: Position = "rope",
    rope: RopeConfig | None = None,
    window_rope: RopeConfig | None = None,
    rope_layers: tuple[bool, ...] = (),
    parallel_residual: bool = False,
    one_norm: bool = False,
    residual_scale: float = 1.0,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: QKNorm = "none",
    attention_scale: float | None = None,
    attention_softcap: float | None = None,
    sinks: bool = False,
    windows: tuple[int | None, ...] = (),
    latent: tuple[int, ...] = (),
    experts: int = 0,
    active_experts: int = 0,
    expert_ffn_size: int | None = None,
    dense_layers: tuple[int, ...] = (),
    routing: Routing | None = None,
    shared_ffn_size: int = 0,
    shared_gate: bool = False,
    clamped: ClampedGate | None = None,
    router_balance: float = 0.0,
    router_z: float = 0.0,
    embedding_scale: float = 1.0,
    embedding_norm: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    tie_embeddings: bool = False,
    embedding_dropout: float = 0.0,
    attention_dropout: float = 0.0,
    residual_dropout: float = 0.0,
    initializer_range: float = 0.02,
    scaled_residual_init: bool = False,
    freeze_padding: bool = False,
    bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    pad_token_id: int | None = None,
) -> ModelConfig:
    """Composes the blocks.

    Args:
        norm, norm_eps, norm_centred, norm_wide, norm_bias: of all norms, see
            :class:`colrow.layers.describe.NormSpec`.
        norms: where they stand in a block.
        position: how positions enter; "rope" with ``rope``.
        window_rope: of the layers with a window, where they rotate differently.
        rope_layers: per layer, whether it has rotary positions; empty for all of them.
        qk_norm: norms of queries and keys.
        attention_scale: what scores are multiplied by; by default ``head_dim ** -0.5``.
        attention_softcap, sinks: of attention scores, see
            :class:`colrow.layers.describe.AttentionSpec`.
        windows: per layer, how many keys back a query sees (itself included), or None for all;
            empty for all layers without one.
        latent: of latent attention the ranks of queries and of keys and values, and the numbers
            without and with rotation and of a value per head, see
            :class:`colrow.layers.describe.LatentAttentionSpec`; empty for the usual attention.
        experts, active_experts: of a mixture of experts in place of the MLP; 0 without.
        expert_ffn_size: features of an expert; ``ffn_size`` by default.
        dense_layers: numbers of the layers that have an MLP all the same.
        routing, shared_gate: see :class:`colrow.layers.describe.ExpertsSpec`.
        shared_ffn_size: features of an MLP beside the experts through which every token passes.
        The others as in :class:`ModelConfig` and the descriptions of its layers.

    Raises:
        ValueError: fields that no model can have, or that do not go together.
    """
    given = locals()
    check_fields(given)
    if (position == "rope") != (rope is not None):
        raise ValueError(f"position={position!r} and rope={rope} do not go together")
    for name, each in (("windows", windows), ("rope_layers", rope_layers)):
        if each and len(each) != num_layers:
            raise ValueError(
                f"{name} says something of {len(each)} layers, and there are {num_layers}"
            )
    if rope is None and (window_rope is not None or rope_layers):
        raise ValueError("window_rope and rope_layers are of a model with rotary positions")

    def normed(size: int, kind: Norm = norm) -> NormSpec:
        return NormSpec(size, kind, norm_eps, norm_centred, norm_wide, bias=norm_bias)

    def of_heads(count: int) -> NormSpec | None:
        if qk_norm == "none":
            return None
        if qk_norm == "by_head":
            return replace(normed(head_dim, "layernorm"), bias=False, heads=count)
        return normed(head_dim * (count if qk_norm == "all_heads" else 1), "rmsnorm")

    attention: Attention = AttentionSpec(
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        rope=rope,
        alibi=position == "alibi",
        query_norm=of_heads(num_heads),
        key_norm=of_heads(num_kv_heads),
        scale=attention_scale,
        softcap=attention_softcap,
        sinks=sinks,
        dropout=attention_dropout,
    )
    if latent:
        attention = LatentAttentionSpec(
            hidden_size,
            num_heads,
            *latent,
            scale=attention_scale,
            dropout=attention_dropout,
        )
    mlp = MLPSpec(hidden_size, ffn_size, activation, gated, mlp_bias, clamped)
    mixture: FeedForward = mlp
    if experts:
        shared = replace(mlp, ffn_size=shared_ffn_size) if shared_ffn_size else None
        expert = replace(mlp, ffn_size=expert_ffn_size or ffn_size)
        mixture = ExpertsSpec(
            expert, experts, active_experts, shared, routing or Routing(), shared_gate
        )
    before = normed(hidden_size) if norms != "after" else None
    after = normed(hidden_size) if norms != "before" else None
    block = BlockSpec(
        attention,
        mixture,
        attention_norm=before,
        mlp_norm=None if one_norm else before,
        attention_post_norm=after,
        mlp_post_norm=after,
        parallel_residual=parallel_residual,
        one_norm=one_norm,
        residual_scale=residual_scale,
        dropout=residual_dropout,
    )
    kinds = tuple(
        zip(
            windows or (None,) * num_layers,
            rope_layers or (rope is not None,) * num_layers,
            (number in dense_layers for number in range(num_layers)),
            strict=True,
        )
    )

    def of_kind(window: int | None, turned: bool, dense: bool) -> BlockSpec:
        own = rope if window is None or window_rope is None else window_rope
        return replace(
            block,
            attention=replace(attention, window=window, rope=own if turned else None),
            mlp=mlp if dense else mixture,
        )

    made = {kind: of_kind(*kind) for kind in kinds}
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        blocks=tuple(made[kind] for kind in kinds),
        max_positions=max_positions,
        norm=normed(hidden_size),
        positions="learned" if position == "learned" else None,
        embedding_scale=embedding_scale,
        embedding_norm=normed(hidden_size) if embedding_norm else None,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        tie_embeddings=tie_embeddings,
        embedding_dropout=embedding_dropout,
        initializer_range=initializer_range,
        scaled_residual_init=scaled_residual_init,
        freeze_padding=freeze_padding,
        router_balance=router_balance,
        router_z=router_z,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
    )


def fields_of(config: ModelConfig) -> dict[str, Any]:
    """The arguments of :func:`decoder` that give this configuration.

    Raises:
        ValueError: for blocks that they cannot say.
    """
    first, windows = config.blocks[0], tuple(block.attention.window for block in config.blocks)
    attention = first.attention
    mixtures = [b.mlp for b in config.blocks if isinstance(b.mlp, ExpertsSpec)]
    dense = [b.mlp for b in config.blocks if isinstance(b.mlp, MLPSpec)]
    turning = tuple(block.attention.rope is not None for block in config.blocks)
    ropes = {
        block.attention.window is None: rope
        for block in config.blocks
        if (rope := block.attention.rope) is not None
    }
    rope = ropes.get(True, ropes.get(False))
    mixture = mixtures[0] if mixtures else None
    mlp = dense[0] if dense else mixtures[0].expert
    norm = config.norm
    rotates, alibi = rope is not None, isinstance(attention, AttentionSpec) and attention.alibi
    found: dict[str, Any] = {
        "family": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        **_fields_of_attention(attention),
        "ffn_size": mlp.ffn_size,
        "max_positions": config.max_positions,
        "norm": norm.kind,
        "norm_eps": norm.eps,
        "norm_centred": norm.centred,
        "norm_wide": norm.wide,
        "norm_bias": norm.bias,
        "norms": (
            "before"
            if first.attention_post_norm is None
            else "after"
            if first.attention_norm is None
            else "around"
        ),
        "activation": mlp.activation,
        "gated": mlp.gated,
        "position": ("rope" if rotates else "alibi" if alibi else config.positions or "none"),
        "rope": rope,
        "window_rope": ropes.get(False) if ropes.get(False) != rope else None,
        "rope_layers": turning if any(turning) and not all(turning) else (),
        "parallel_residual": first.parallel_residual,
        "one_norm": first.one_norm,
        "residual_scale": first.residual_scale,
        "mlp_bias": mlp.bias,
        "windows": windows if any(window is not None for window in windows) else (),
        "experts": mixture.count if mixture else 0,
        "active_experts": mixture.active if mixture else 0,
        "expert_ffn_size": mixture.ffn_size if mixture else None,
        "dense_layers": tuple(
            number
            for number, block in enumerate(config.blocks)
            if mixture and isinstance(block.mlp, MLPSpec)
        ),
        "routing": mixture.routing if mixture else None,
        "shared_ffn_size": mixture.shared.ffn_size if mixture and mixture.shared else 0,
        "shared_gate": mixture is not None and mixture.shared_gate,
        "clamped": mlp.clamped,
        "router_balance": config.router_balance,
        "router_z": config.router_z,
        "embedding_scale": config.embedding_scale,
        "embedding_norm": config.embedding_norm is not None,
        "logit_scale": config.logit_scale,
        "logit_softcap": config.logit_softcap,
        "tie_embeddings": config.tie_embeddings,
        "embedding_dropout": config.embedding_dropout,
        "residual_dropout": first.dropout,
        "initializer_range": config.initializer_range,
        "scaled_residual_init": config.scaled_residual_init,
        "freeze_padding": config.freeze_padding,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": config.eos_token_ids,
        "pad_token_id": config.pad_token_id,
    }
    if decoder(**found) != config:
        raise ValueError(
            f"the blocks of this {config.family} model differ in more than windows and "
            "rotary positions"
        )
    return found


def _fields_of_attention(attention: Attention) -> dict[str, Any]:
    common = {
        "num_heads": attention.num_heads,
        "head_dim": attention.key_size,
        "attention_scale": attention.scale,
        "attention_dropout": attention.dropout,
    }
    if isinstance(attention, AttentionSpec):
        return common | {
            "num_kv_heads": attention.num_kv_heads,
            "qkv_bias": attention.qkv_bias,
            "output_bias": attention.output_bias,
            "qk_norm": _kind_of_norm(attention),
            "attention_softcap": attention.softcap,
            "sinks": attention.sinks,
            "latent": (),
        }
    ranks = attention.query_rank, attention.kv_rank
    return common | {
        "num_kv_heads": attention.num_heads,
        "latent": (*ranks, attention.nope, attention.rotated, attention.value),
    }


def _kind_of_norm(attention: AttentionSpec) -> QKNorm:
    norm = attention.query_norm
    if norm is None:
        return "none"
    if norm.heads:
        return "by_head"
    return "all_heads" if attention.norms_all_heads else "each_head"


def with_dropout(config: ModelConfig, p: float) -> ModelConfig:
    """The same decoder with one probability for embeddings, attention weights and residuals."""
    return replace(
        config,
        embedding_dropout=p,
        blocks=tuple(
            replace(block, dropout=p, attention=replace(block.attention, dropout=p))
            for block in config.blocks
        ),
    )
