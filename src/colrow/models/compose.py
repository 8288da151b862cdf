"""Decoders whose blocks are alike, or differ in windows and rotary positions alone. No torch.

The numbers and choices of such a decoder are a flat list of fields, as configuration files have
them: :func:`decoder` composes its blocks from them, and :func:`fields_of` is the way back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from colrow.layers.describe import (
    AttentionSpec,
    BlockSpec,
    ExpertsSpec,
    FeedForward,
    MLPSpec,
    NormSpec,
    Routing,
)
from colrow.layers.options import Activation, ClampedGate, Norm, Position, RopeConfig
from colrow.models.config import ModelConfig
from colrow.models.config_limits import check_fields

Norms = Literal["before", "after", "around"]
"""Where a block's norms stand: in front of its layers, behind them, or both."""
QKNorm = Literal["none", "each_head", "all_heads"]


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
    norms: Norms = "before",
    activation: Activation = "silu",
    gated: bool = True,
    position: Position = "rope",
    rope: RopeConfig | None = None,
    window_rope: RopeConfig | None = None,
    parallel_residual: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: QKNorm = "none",
    attention_scale: float | None = None,
    windows: tuple[int | None, ...] = (),
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
        norm, norm_eps, norm_centred, norm_wide: of all norms, see
            :class:`colrow.layers.describe.NormSpec`.
        norms: where they stand in a block.
        position: how positions enter; "rope" with ``rope``.
        window_rope: of the layers with a window, where they rotate differently.
        qk_norm: norms of queries and keys, over each head's features or over all heads'.
        attention_scale: what scores are multiplied by; by default ``head_dim ** -0.5``.
        windows: per layer, how many keys back a query sees (itself included), or None for all;
            empty for all layers without one.
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
    if windows and len(windows) != num_layers:
        raise ValueError(f"{len(windows)} windows for {num_layers} layers")
    if window_rope is not None and rope is None:
        raise ValueError("window_rope is of a model with rotary positions, and rope is None")

    def normed(size: int, kind: Norm = norm) -> NormSpec:
        return NormSpec(size, kind, norm_eps, norm_centred, norm_wide)

    sizes = {"each_head": (head_dim, head_dim)}.get(
        qk_norm, (num_heads * head_dim, num_kv_heads * head_dim)
    )
    query_norm, key_norm = (
        None if qk_norm == "none" else normed(size, "rmsnorm") for size in sizes
    )
    attention = AttentionSpec(
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        rope=rope,
        alibi=position == "alibi",
        query_norm=query_norm,
        key_norm=key_norm,
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
        mlp_norm=before,
        attention_post_norm=after,
        mlp_post_norm=after,
        parallel_residual=parallel_residual,
        dropout=residual_dropout,
    )
    seen: dict[tuple[int | None, bool], BlockSpec] = {}

    def of_layer(number: int) -> BlockSpec:
        window, dense = windows[number] if windows else None, number in dense_layers
        if (window, dense) not in seen:
            own = replace(block, mlp=mlp) if dense else block
            if window is not None:
                turned = attention if window_rope is None else replace(attention, rope=window_rope)
                own = replace(own, attention=replace(turned, window=window))
            seen[window, dense] = own
        return seen[window, dense]

    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        blocks=tuple(map(of_layer, range(num_layers))),
        max_positions=max_positions,
        norm=normed(hidden_size),
        positions="learned" if position == "learned" else None,
        embedding_scale=embedding_scale,
        embedding_norm=normed(hidden_size) if embedding_norm else None,
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
    if not isinstance(attention, AttentionSpec):
        raise ValueError(f"{type(attention).__name__} is none of the kinds that fields can say")
    ropes = {
        block.attention.window is None: block.attention.rope
        for block in config.blocks
        if isinstance(block.attention, AttentionSpec)
    }
    rope = ropes.get(True, ropes.get(False))
    mixture = mixtures[0] if mixtures else None
    mlp = dense[0] if dense else mixtures[0].expert
    norm, qk_norm = config.norm, attention.query_norm
    rotates, alibi = rope is not None, attention.alibi
    found: dict[str, Any] = {
        "family": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "ffn_size": mlp.ffn_size,
        "max_positions": config.max_positions,
        "norm": norm.kind,
        "norm_eps": norm.eps,
        "norm_centred": norm.centred,
        "norm_wide": norm.wide,
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
        "parallel_residual": first.parallel_residual,
        "qkv_bias": attention.qkv_bias,
        "output_bias": attention.output_bias,
        "mlp_bias": mlp.bias,
        "qk_norm": (
            "none" if qk_norm is None else "all_heads" if attention.norms_all_heads else "each_head"
        ),
        "attention_scale": attention.scale,
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
        "tie_embeddings": config.tie_embeddings,
        "embedding_dropout": config.embedding_dropout,
        "attention_dropout": attention.dropout,
        "residual_dropout": first.dropout,
        "initializer_range": config.initializer_range,
        "scaled_residual_init": config.scaled_residual_init,
        "freeze_padding": config.freeze_padding,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": config.eos_token_ids,
        "pad_token_id": config.pad_token_id,
    }
    if decoder(**found) != config:
        raise ValueError(f"the blocks of this {config.family} model differ in more than windows")
    return found


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
