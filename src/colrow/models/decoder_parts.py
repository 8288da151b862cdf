"""The layers of a decoder, made from its description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.layers.attention import ParallelAttention
from colrow.layers.block import ParallelBlock
from colrow.layers.column import ColumnParallelLinear
from colrow.layers.describe import (
    Attention,
    AttentionSpec,
    Division,
    ExpertsSpec,
    FeedForward,
    LatentAttentionSpec,
    MLPSpec,
    NormSpec,
    unknown,
)
from colrow.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from colrow.layers.experts import ParallelExperts
from colrow.layers.latent import LatentAttention
from colrow.layers.mlp import ParallelMLP
from colrow.layers.norm import hidden_norm
from colrow.models.config import ModelConfig
from colrow.sharding import Sharding


class _Place(TypedDict):
    device: torch.device
    dtype: torch.dtype | None


@dataclass(frozen=True)
class DecoderParts:
    """Makes each layer; arguments as for :class:`colrow.models.decoder.Decoder`."""

    config: ModelConfig
    division: Division
    tp: ParallelGroup
    sharding: Sharding
    device: torch.device
    dtype: torch.dtype | None

    @property
    def _place(self) -> _Place:
        return {"device": self.device, "dtype": self.dtype}

    def norm(self, spec: NormSpec | None, layer: str) -> nn.Module | None:
        """A norm over the hidden size, where there is one."""
        if spec is None:
            return None
        divided = self.sharding.sequence_parallel
        return hidden_norm(spec, self.tp, divided_sequence=divided, layer=layer, **self._place)

    def embedding(self) -> VocabParallelEmbedding:
        """The token embedding."""
        config = self.config
        return VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            self.tp,
            partition=self.division.of(config.vocab_size),
            padding_idx=config.pad_token_id if config.freeze_padding else None,
            sharding=self.sharding,
            layer="embedding",
            **self._place,
        )

    def positions(self) -> PositionEmbedding | None:
        """Learned positions, where the model has them."""
        if self.config.positions is None:
            return None
        return PositionEmbedding(
            self.config.max_positions,
            self.config.hidden_size,
            self.tp,
            sharding=self.sharding,
            layer="positions",
            **self._place,
        )

    def block(self, index: int) -> ParallelBlock:
        """Block number ``index``."""
        block, name = self.config.blocks[index], f"blocks.{index}"
        return ParallelBlock(
            self._attention(block.attention, index),
            self._mlp(block.mlp, f"{name}.mlp"),
            self.norm(block.attention_norm, f"{name}.attention_norm"),
            self.norm(block.mlp_norm, f"{name}.mlp_norm"),
            self.tp,
            attention_post_norm=self.norm(block.attention_post_norm, f"{name}.attention_post_norm"),
            mlp_post_norm=self.norm(block.mlp_post_norm, f"{name}.mlp_post_norm"),
            parallel_residual=block.parallel_residual,
            one_norm=block.one_norm,
            residual_scale=block.residual_scale,
            dropout=block.dropout,
        )

    def _attention(self, spec: Attention, index: int) -> ParallelAttention | LatentAttention:
        if isinstance(spec, LatentAttentionSpec) and spec.rope is not None:
            return LatentAttention(
                spec,
                self.tp,
                division=self.division,
                sharding=self.sharding,
                layer_index=index,
                layer=f"blocks.{index}.attention",
                **self._place,
            )
        if not isinstance(spec, AttentionSpec):
            unknown(spec, "the decoder")
        return ParallelAttention(
            spec.hidden_size,
            spec.heads(self.division),
            spec.head_dim,
            self.tp,
            rope=spec.rope,
            alibi=spec.alibi,
            qkv_bias=spec.qkv_bias,
            output_bias=spec.output_bias,
            query_norm=spec.query_norm,
            key_norm=spec.key_norm,
            scale=spec.scale,
            softcap=spec.softcap,
            sinks=spec.sinks,
            window=spec.window,
            dropout=spec.dropout,
            sharding=self.sharding,
            layer_index=index,
            layer=f"blocks.{index}.attention",
            **self._place,
        )

    def _mlp(self, spec: FeedForward, layer: str) -> ParallelMLP | ParallelExperts:
        if isinstance(spec, ExpertsSpec):
            return ParallelExperts(
                spec,
                self.tp,
                division=self.division,
                sharding=self.sharding,
                layer=layer,
                **self._place,
            )
        if not isinstance(spec, MLPSpec):
            unknown(spec, "the decoder")
        return ParallelMLP(
            spec.hidden_size,
            spec.ffn_size,
            self.tp,
            activation=spec.activation,
            gated=spec.gated,
            bias=spec.bias,
            partition=self.division.of(spec.ffn_size),
            sharding=self.sharding,
            layer=layer,
            **self._place,
        )

    def head(self) -> ColumnParallelLinear | None:
        """The output projection; None where the embedding is used."""
        if self.config.tie_embeddings:
            return None
        return ColumnParallelLinear(
            self.config.hidden_size,
            self.config.vocab_size,
            self.tp,
            bias=False,
            partition=self.division.of(self.config.vocab_size),
            sharding=self.sharding,
            layer="head",
            **self._place,
        )


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives the meta parameters memory on ``device``; buffers move there with their values."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)
