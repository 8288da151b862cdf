"""A Llama decoder in plain PyTorch, unsplit: what one process runs and what DTensor splits.

Parameter names are Hugging Face's, so that its state dict loads as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.workloads import Training

EPS, THETA = 1e-6, 10000.0


class Norm(nn.Module):
    """RMS norm by torch's own kernel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


def rope(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[sequence, head_dim]``."""
    frequencies = 1.0 / THETA ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; ``x`` is ``[batch, heads, sequence, head_dim]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Causal attention of projections ``[batch, sequence, heads * head_dim]``, to the same."""
    batch, length, _ = q.shape
    q, k, v = (x.view(batch, length, -1, head_dim).transpose(1, 2) for x in (q, k, v))
    q, k = rotate(q, *tables), rotate(k, *tables)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).reshape(batch, length, -1)


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden, hidden, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(attend(q, k, v, self.head_dim, tables))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP with norms and residuals."""

    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(hidden)
        self.self_attn = Attention(hidden, heads)
        self.post_attention_layernorm = Norm(hidden)
        self.mlp = MLP(hidden, ffn)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything before the head."""

    def __init__(self, shape: Training) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(
            Block(shape.hidden, shape.heads, shape.ffn) for _ in range(shape.layers)
        )
        self.norm = Norm(shape.hidden)


class PlainDecoder(nn.Module):
    """Token ids ``[batch, sequence]`` to logits ``[batch, sequence, vocab]``."""

    def __init__(self, shape: Training) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.tables = rope(shape.sequence, shape.hidden // shape.heads)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x, self.tables)
        return self.lm_head(self.model.norm(x))
