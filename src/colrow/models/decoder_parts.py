"""The layers of a decoder, made from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.layers.attention import ParallelAttention
from colrow.layers.block import ParallelBlock
from colrow.layers.column import ColumnParallelLinear
from colrow.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from colrow.layers.mlp import ParallelMLP
from colrow.layers.norm import LayerNorm, RMSNorm
from colrow.models.config import Layout, ModelConfig


class _Place(TypedDict):
    device: torch.device
    dtype: torch.dtype | None


class _Sharding(TypedDict):
    sequence_parallel: bool
    keep_gathered_input: bool
    overlap: bool
    chunk_bytes: int | None


@dataclass(frozen=True)
class DecoderParts:
    """Makes each layer; arguments as for :class:`colrow.models.decoder.Decoder`."""

    config: ModelConfig
    layout: Layout
    tp: ParallelGroup
    sequence_parallel: bool
    keep_gathered_input: bool
    overlap: bool
    chunk_bytes: int | None
    device: torch.device
    dtype: torch.dtype | None

    @property
    def _place(self) -> _Place:
        return {"device": self.device, "dtype": self.dtype}

    @property
    def _sharding(self) -> _Sharding:
        return {
            "sequence_parallel": self.sequence_parallel,
            "keep_gathered_input": self.keep_gathered_input,
            "overlap": self.overlap,
            "chunk_bytes": self.chunk_bytes,
        }

    def norm(self, layer: str) -> nn.Module:
        """A norm over the hidden size."""
        config = self.config
        kind = RMSNorm if config.norm == "rmsnorm" else LayerNorm
        applied_to: Literal["all", "shard"] = "shard" if self.sequence_parallel else "all"
        return kind(
            config.hidden_size,
            self.tp,
            eps=config.norm_eps,
            applied_to=applied_to,
            layer=layer,
            **self._place,
        )

    def embedding(self) -> VocabParallelEmbedding:
        """The token embedding."""
        config = self.config
        return VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            self.tp,
            partition=self.layout.vocab,
            padding_idx=config.pad_token_id if config.freeze_padding else None,
            sequence_parallel=self.sequence_parallel,
            layer="embedding",
            **self._place,
        )

    def positions(self) -> PositionEmbedding | None:
        """The table of learned positions, where there is one."""
        if self.config.position != "learned":
            return None
        return PositionEmbedding(
            self.config.max_positions,
            self.config.hidden_size,
            self.tp,
            sequence_parallel=self.sequence_parallel,
            layer="positions",
            **self._place,
        )

    def block(self, index: int) -> ParallelBlock:
        """Block number ``index``."""
        config = self.config
        attention = ParallelAttention(
            config.hidden_size,
            self.layout.heads,
            config.head_dim,
            self.tp,
            rope=config.rope,
            alibi=config.position == "alibi",
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            window=config.window(index),
            dropout=config.attention_dropout,
            layer_index=index,
            layer=f"blocks.{index}.attention",
            **self._sharding,
            **self._place,
        )
        mlp = ParallelMLP(
            config.hidden_size,
            config.ffn_size,
            self.tp,
            activation=config.activation,
            gated=config.gated,
            bias=config.mlp_bias,
            partition=self.layout.ffn,
            layer=f"blocks.{index}.mlp",
            **self._sharding,
            **self._place,
        )
        return ParallelBlock(
            attention,
            mlp,
            self.norm(f"blocks.{index}.attention_norm"),
            self.norm(f"blocks.{index}.mlp_norm"),
            self.tp,
            parallel_residual=config.parallel_residual,
            dropout=config.residual_dropout,
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
            partition=self.layout.vocab,
            layer="head",
            **self._sharding,
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
