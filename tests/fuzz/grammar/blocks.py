"""Blocks of every style: ``[batch, sequence, width]`` to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.fuzz.grammar.steps import Chain, run_steps

Spec = dict[str, Any]
BLOCKS: dict[str, Callable[[int, Spec], nn.Module]] = {}

# (query heads, KV heads)
HEADS = [[2, 2], [4, 4], [3, 3], [4, 2], [6, 2], [5, 1], [6, 3], [1, 1], [7, 7]]
HOW = ["module", "functional", "matmul", "einsum", "conv", "kwargs", "dict", "list", "named"]


def block(cls: Any) -> Any:
    """Enters a class under its name."""
    BLOCKS[cls.__name__] = cls
    return cls


@block
class MLP(nn.Module):
    """Up, some steps, down; ``how`` says in which way the matrices are multiplied with."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.how, ffn = spec["how"], spec["ffn"]
        self.up, self.down = nn.Linear(width, ffn, bias=spec["bias"]), nn.Linear(ffn, width)
        self.chain = Chain(spec["steps"], ffn)
        self.inline = spec["inline"]

    def forward(self, x: Tensor) -> Tensor:
        h = self._multiply(self.up, x)
        steps = (self.chain.functions, self.chain.parts)
        h = run_steps(*steps, h) if self.inline else self.chain(h)
        return self._multiply(self.down, h)

    def _multiply(self, linear: nn.Linear, x: Tensor) -> Tensor:
        bias = 0 if linear.bias is None else linear.bias
        if self.how == "functional":
            return F.linear(x, linear.weight, linear.bias)
        if self.how == "matmul":
            return x @ linear.weight.t() + bias
        if self.how == "einsum":
            return torch.einsum("bsi,oi->bso", x, linear.weight) + bias
        if self.how == "conv":
            y = F.conv1d(x.transpose(1, 2), linear.weight.unsqueeze(-1), linear.bias)
            return y.transpose(1, 2)
        if self.how == "kwargs":
            return linear(input=x)
        if self.how == "dict":
            return {"y": linear(x)}["y"]
        if self.how == "list":
            return torch.stack([linear(row) for row in x])
        if self.how == "named":
            return torch.addmm(
                torch.zeros(1).to(x) + bias, x.flatten(0, 1), linear.weight.t()
            ).view(*x.shape[:-1], -1)
        return linear(x)


@block
class Gated(nn.Module):
    """A gate, apart or in one matrix with what it gates."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.style = spec["style"] % 4
        self.both = nn.Linear(width, 2 * ffn, bias=spec["bias"])
        self.gate, self.up = None, None
        if self.style == 0:
            self.both = None
            self.gate = nn.Linear(width, ffn, bias=spec["bias"])
            self.up = nn.Linear(width, ffn, bias=spec["bias"])
        self.chain = Chain(spec["steps"], ffn)
        self.down = nn.Linear(ffn, width, bias=spec["bias"])

    def forward(self, x: Tensor) -> Tensor:
        if self.both is None:
            gate, up = self.gate(x), self.up(x)
        elif self.style == 1:
            gate, up = self.both(x).chunk(2, -1)
        elif self.style == 2:
            gate, up = self.both(x).unflatten(-1, (-1, 2)).unbind(-1)
        else:
            up, gate = self.both(x).view(*x.shape[:-1], 2, -1).unbind(-2)
        return self.down(self.chain(F.silu(gate) * up))


class _Attention(nn.Module):
    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.heads, self.kv_heads = spec["heads"]
        self.size, self.style = spec["head_dim"], spec["style"]
        self.window = 18
        self.output = nn.Linear(self.heads * self.size, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[batch, heads, sequence, size]`` each."""
        share = self.heads // self.kv_heads
        if share > 1:
            k, v = (t.repeat_interleave(share, 1) for t in (k, v))
        if self.style == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2) / self.size**0.5
            places = torch.arange(q.shape[2])
            distance = places[:, None] - places
            if self.style == 1:
                scores = scores.masked_fill(distance < 0, -1e30)
            elif self.style == 2:  # ALiBi
                slopes = 2.0 ** -torch.arange(1, self.heads + 1)
                scores = scores - slopes.to(scores)[:, None, None] * distance.abs()
            elif self.style == 3:  # a cap, over all keys
                scores = 2 * torch.tanh(scores / 2)
            elif self.style == 4:  # normalised over the heads, not the keys
                return (scores.softmax(1) @ v).transpose(1, 2).flatten(2)
            elif self.style == 5:  # a window, of a size that may be a number of heads
                seen = (distance >= 0) & (distance < self.window)
                scores = scores.masked_fill(~seen, -1e30)
            y = scores.softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)


@block
class Attention(_Attention):
    """Q, K and V apart."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__(width, spec)
        self.q = nn.Linear(width, self.heads * self.size, bias=spec["bias"])
        self.k = nn.Linear(width, self.kv_heads * self.size, bias=spec["bias"])
        self.v = nn.Linear(width, self.kv_heads * self.size, bias=spec["bias"])
        self.norm = nn.LayerNorm(self.size) if spec["inline"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.output(self.attend(self.norm(q), self.norm(k), v))


@block
class FusedAttention(_Attention):
    """Q, K and V in one matrix: side by side, or head by head."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__(width, spec)
        self.by_head = spec["inline"] and self.heads == self.kv_heads
        total = (self.heads + 2 * self.kv_heads) * self.size
        self.qkv = nn.Linear(width, total, bias=spec["bias"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).view(*x.shape[:2], -1, self.size).transpose(1, 2)
        if self.by_head:
            q, k, v = y.unflatten(1, (self.heads, 3)).unbind(2)
        else:
            q, k, v = y.split([self.heads, self.kv_heads, self.kv_heads], 1)
        return self.output(self.attend(q, k, v))


@block
class TorchAttention(nn.Module):
    """nn.MultiheadAttention."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        heads = next(h for h in (spec["heads"][0], 2, 1) if width % h == 0)
        self.first, self.weights = spec["bias"], spec["inline"]
        self.causal = spec["style"] % 2 == 1
        self.attention = nn.MultiheadAttention(
            width, heads, batch_first=self.first, bias=spec["style"] < 3
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        mask = None
        if self.causal:
            length = x.shape[1 if self.first else 0]
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        y, weights = self.attention(x, x, x, need_weights=self.weights, attn_mask=mask)
        y = y if self.first else y.transpose(0, 1)
        return y if weights is None else y * (1 + weights.amax())


@block
class TorchEncoder(nn.Module):
    """nn.TransformerEncoderLayer, with a mask for padding or without."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        heads = next(h for h in (spec["heads"][0], 2, 1) if width % h == 0)
        self.padded, self.nested = spec["style"] % 2 == 1, spec["style"] > 2
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            spec["ffn"],
            dropout=0.0,
            activation=F.gelu if spec["bias"] else F.relu,
            norm_first=spec["inline"] and not self.nested,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, 1) if self.nested else layer

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.padded:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[0, 1:] = True
        return self.encoder(x, src_key_padding_mask=mask)[:, : x.shape[1]]


@block
class TorchDecoder(nn.Module):
    """nn.TransformerDecoderLayer, reading what it decodes."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        heads = next(h for h in (spec["heads"][0], 2, 1) if width % h == 0)
        self.layer = nn.TransformerDecoderLayer(
            width, heads, spec["ffn"], dropout=0.0, norm_first=spec["inline"], batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


@block
class Recurrent(nn.Module):
    """LSTM or GRU between two linear layers."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        kind = nn.GRU if spec["inline"] else nn.LSTM
        ffn = spec["ffn"]
        self.up = nn.Linear(width, ffn)
        self.cell = kind(ffn, ffn, batch_first=True, bidirectional=spec["style"] == 1)
        self.down = nn.Linear(ffn * (1 + (spec["style"] == 1)), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.cell(self.up(x))[0])


@block
class Convolved(nn.Module):
    """Convolutions along the sequence."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.up = nn.Conv1d(width, ffn, 3, padding=1, bias=spec["bias"])
        self.down = nn.Conv1d(ffn, width, 1)
        self.chain = Chain(spec["steps"], ffn)

    def forward(self, x: Tensor) -> Tensor:
        h = self.chain(self.up(x.transpose(1, 2)).transpose(1, 2))
        return self.down(h.transpose(1, 2)).transpose(1, 2)


@block
class LowRank(nn.Module):
    """An MLP with low-rank adapters on its matrices."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.up_a, self.up_b = nn.Linear(width, 2, bias=False), nn.Linear(2, ffn, bias=False)
        self.down_a, self.down_b = nn.Linear(ffn, 2, bias=False), nn.Linear(2, width, bias=False)
        self.chain = Chain(spec["steps"], ffn)

    def forward(self, x: Tensor) -> Tensor:
        h = self.chain(self.up(x) + 0.5 * self.up_b(self.up_a(x)))
        return self.down(h) + self.down_b(self.down_a(h))


@block
class Normed(nn.Module):
    """An MLP with parametrised weights."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.up = weight_norm(nn.Linear(width, ffn), dim=0 if spec["inline"] else None)
        self.down = weight_norm(nn.Linear(ffn, width)) if spec["bias"] else nn.Linear(ffn, width)
        self.chain = Chain(spec["steps"], ffn)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.chain(self.up(x)))


@block
class Bare(nn.Module):
    """Matrices that belong to no layer."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.up = nn.Parameter(torch.randn(width, ffn) / width**0.5)
        self.down = nn.Parameter(torch.randn(ffn, width) / ffn**0.5)
        self.shift = nn.Parameter(torch.randn(ffn))
        self.chain = Chain(spec["steps"], ffn)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x @ self.up + self.shift) @ self.down


@block
class Twice(nn.Module):
    """One layer used twice, and one matrix that two layers share."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.style = spec["style"] % 4
        self.chain = Chain(spec["steps"], ffn)
        self.other = nn.Linear(width, ffn)
        if self.style == 1:
            self.other.weight = self.up.weight
        if self.style == 3:
            self.other.bias = self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.style == 0:
            return self.down(self.chain(self.up(x))) + self.down(self.up(x.flip(1)).relu())
        if self.style == 2:  # the matrix up is transposed as a second down
            return self.down(self.chain(self.up(x))) + F.linear(
                self.other(x).tanh(), self.up.weight.t()
            )
        return self.down(self.chain(self.up(x)) * self.other(x).sigmoid())


@block
class Experts(nn.Module):
    """Each token goes to the best of three MLPs."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList([MLP(width, spec) for _ in range(3)])
        self.style = spec["style"] % 2

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        if self.style == 0:
            return sum(e(x) * share[..., i : i + 1] for i, e in enumerate(self.experts))
        best, y = share.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = best == i
            if chosen.any():
                y[chosen] = expert(x[chosen].unsqueeze(0)).squeeze(0)
        return y * share.amax(-1, keepdim=True)


@block
class Sometimes(nn.Module):
    """Modules that run for some batches only: long ones, in training, or when asked to."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.usual, self.other = MLP(width, spec), MLP(width, spec)
        self.style = spec["style"] % 5
        if self.style == 4:  # both hold one matrix
            self.other.down.weight = self.usual.down.weight

    def forward(self, x: Tensor) -> Tensor:
        asked = {
            0: x.shape[1] > 7,
            1: self.training,
            2: x.shape[0] > 2,
            3: bool(x.abs().amax() > 4),
            4: x.shape[1] == 1,
        }[self.style]
        return self.other(x) if asked else self.usual(x)


@block
class Bottleneck(nn.Module):
    """Three layers, and a skip inside, in the divided features."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.up, self.middle, self.down = (
            nn.Linear(width, ffn),
            nn.Linear(ffn, ffn),
            nn.Linear(ffn, width),
        )
        self.chain, self.style = Chain(spec["steps"], ffn), spec["style"] % 3

    def forward(self, x: Tensor) -> Tensor:
        h = self.chain(self.up(x))
        if self.style == 0:
            return self.down(h + self.middle(h).relu())
        if self.style == 1:
            return self.down(torch.cat([h, self.middle(h)], -1).unflatten(-1, (2, -1)).amax(-2))
        return self.down(self.middle(h.relu()) * h.mean(-1, keepdim=True))


@block
class Nested(nn.Module):
    """Rows of different lengths through an MLP, as a nested tensor or as a list."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.style, self.jagged = spec["style"] % 3, spec["inline"]

    def forward(self, x: Tensor) -> Tensor:
        rows = [row[: max(1, x.shape[1] - i)] for i, row in enumerate(x)]
        if self.style == 0:
            packed = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            y = self.down(self.up(packed).relu())
        elif self.style == 1:
            flat = self.down(self.up(torch.cat(rows)).relu())
            parts = flat.split([len(row) for row in rows])
            y = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        else:
            layout = torch.jagged if self.jagged else torch.strided
            nested = torch.nested.as_nested_tensor(rows, layout=layout)
            y = self.down(self.up(nested).relu()).to_padded_tensor(0.0)
        return F.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))


@block
class Stacked(nn.Module):
    """Layers that go one into the other without anything in between."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.layers = nn.Sequential(
            nn.Linear(width, ffn), nn.Tanh(), nn.Linear(ffn, ffn), nn.GELU(), nn.Linear(ffn, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@block
class Table(nn.Module):
    """An embedding inside: of positions, or of what the features say."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        ffn = spec["ffn"]
        self.table, self.style = nn.Embedding(ffn + 20, width), spec["style"] % 3
        self.up = nn.Linear(width, ffn)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == 0:
            return self.table(torch.arange(x.shape[1])).expand_as(x)
        if self.style == 1:
            return self.table(self.up(x).argmax(-1))
        return self.up(x).softmax(-1) @ self.table.weight[: self.up.out_features]
