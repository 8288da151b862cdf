"""A rank's share of a block as plain PyTorch modules: the same shapes, and no collectives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.shapes import Share
from colrow.layers.activation import ACTIVATIONS
from colrow.layers.block import ParallelBlock
from colrow.layers.describe import MLPSpec, unknown


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP with the sizes of one rank; ``[batch, sequence, hidden]``."""

    def __init__(self, share: Share, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp, hidden = (
            share.attention,
            share.config.blocks[0].mlp,
            share.config.hidden_size,
        )
        if not isinstance(mlp, MLPSpec):
            unknown(mlp, "the plain block")
        self.head_dim, self.gated = attention.head_dim, mlp.gated
        self.act = ACTIVATIONS[mlp.activation]
        self.heads, self.kv_heads = (p.size(0) for p in (share.heads.query, share.heads.key_value))
        ffn = share.division.of(mlp.ffn_size).size(0)
        place = {"device": device, "dtype": dtype}
        spec = share.config.norm
        norm = nn.RMSNorm if spec.kind == "rmsnorm" else nn.LayerNorm
        self.attention_norm = norm(hidden, eps=spec.eps, **place)
        self.mlp_norm = norm(hidden, eps=spec.eps, **place)
        features = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(hidden, features, bias=attention.qkv_bias, **place)
        mixed = self.heads * self.head_dim
        self.output = nn.Linear(mixed, hidden, bias=attention.output_bias, **place)
        wide = ffn * (2 if self.gated else 1)
        self.up = nn.Linear(hidden, wide, bias=mlp.bias, **place)
        self.down = nn.Linear(ffn, hidden, bias=mlp.bias, **place)
        self.rope = attention.rope is not None
        if attention.rope is not None:
            steps = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
            angles = torch.outer(
                torch.arange(share.sequence, device=device).float(), attention.rope.theta**-steps
            )
            self.register_buffer("cos", torch.cat([angles, angles], -1).cos().to(dtype))
            self.register_buffer("sin", torch.cat([angles, angles], -1).sin().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        fused = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.head_dim)
        q, k, v = (
            part.transpose(1, 2)
            for part in fused.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        )  # each [batch, heads_local, sequence, head_dim]
        if self.rope:
            q, k = self._turned(q), self._turned(k)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
        hidden = self.up(self.mlp_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * hidden
        else:
            hidden = self.act(hidden)
        return x + self.down(hidden)

    def _turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin

    @torch.no_grad()
    def take_weights(self, block: ParallelBlock) -> None:
        """Those of colrow's block, which is divided alike."""
        pairs = (
            (self.attention_norm, block.attention_norm),
            (self.mlp_norm, block.mlp_norm),
            (self.qkv, block.attention.qkv),
            (self.output, block.attention.output),
            (self.up, block.mlp.up),
            (self.down, block.mlp.down),
        )
        for mine, theirs in pairs:
            for name, parameter in mine.named_parameters():
                parameter.copy_(theirs.get_parameter(name))
