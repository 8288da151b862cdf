from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import HeadPartition, ParallelAttention, ParallelGroup, Partition, rng
from colrow.layers import scores
from colrow.layers.context import AttentionContext
from colrow.layers.describe import NormSpec
from colrow.layers.options import RopeConfig
from colrow.layers.position import alibi_slopes, rope_frequencies
from tests.layers.dense import Weights, compare, divided, place, raises, random, whole_weights
from tests.ranks import RankPool

BATCH, SEQUENCE, HIDDEN, HEAD_DIM = 2, 7, 12, 4
FP64 = torch.float64
ROPE = RopeConfig(theta=100.0, dims=HEAD_DIM)
COUNTS = ((4, 4), (5, 5), (5, 1), (8, 2), (9, 3))


@dataclass(frozen=True)
class DenseAttention:
    """Attention on one device, written as the papers and transformers write it."""

    num_heads: int
    num_kv_heads: int
    rope: RopeConfig | None = None
    alibi: bool = False
    window: int | None = None
    norm_eps: float | None = None
    all_heads: bool = False  # the norms go over the features of all heads
    centred: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout: tuple[int, float] | None = None  # key and probability
    valid: Tensor | None = None
    positions: Tensor | None = None

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        sizes = [n * HEAD_DIM for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        fused = F.linear(x, weights["qkv.weight"], weights.get("qkv.bias"))
        q, k, v = fused.split(sizes, -1)
        if self.all_heads:
            q, k = self._normed(weights, q, k)
        q, k, v = (part.reshape(batch, length, -1, HEAD_DIM).transpose(1, 2) for part in (q, k, v))
        if not self.all_heads:
            q, k = self._normed(weights, q, k)
        positions = torch.arange(length).expand(batch, length)
        if self.valid is not None:
            positions = (self.valid.long().cumsum(-1) - 1).clamp(min=0)
        if self.positions is not None:
            positions = self.positions.expand(batch, length)
        if self.rope is not None:
            q, k = (rotate(part, positions, self.rope) for part in (q, k))
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mask = torch.zeros(batch, 1, length, length, dtype=x.dtype)
        for query, key in itertools.product(range(length), repeat=2):
            if key > query or (self.window is not None and query - key >= self.window):
                mask[:, :, query, key] = -math.inf
        if self.valid is not None:
            hidden = ~self.valid[:, None, None, :] & ~torch.eye(length, dtype=torch.bool)
            mask = mask.masked_fill(hidden, -math.inf)
        if self.alibi:
            slopes = torch.tensor(bloom_slopes(self.num_heads), dtype=x.dtype)
            mask = mask + slopes.view(1, -1, 1, 1) * positions.view(batch, 1, 1, length)
        if self.dropout is None and self.softcap is None and not self.sinks:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)
        else:
            scores = q @ k.mT * (HEAD_DIM**-0.5 if self.scale is None else self.scale)
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            scores = scores + mask
            total = scores.exp().sum(-1, keepdim=True)
            if self.sinks:
                total = total + weights["sinks.weight"].exp().view(-1, 1, 1)
            scores = scores.exp() / total
            if self.dropout is not None:
                key, p = self.dropout
                keep = rng.uniform(key, torch.arange(scores.numel())).view(scores.shape) >= p
                scores = scores * keep / (1 - p)
            mixed = scores @ v
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
        return F.linear(mixed, weights["output.weight"], weights.get("output.bias"))

    def _normed(self, weights: Weights, *parts: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys, each divided by the root of its mean square."""
        if self.norm_eps is None:
            return parts
        scales = (self.centred + weights[f"{name}_norm.weight"] for name in ("query", "key"))
        return tuple(
            part / (part.square().mean(-1, keepdim=True) + self.norm_eps).sqrt() * scale
            for part, scale in zip(parts, scales, strict=True)
        )


def rotate(x: Tensor, positions: Tensor, rope: RopeConfig) -> Tensor:
    """Each pair of dimensions as a complex number, turned by position times frequency."""
    half = rope.dims // 2
    frequencies = torch.tensor([rope.theta ** (-2 * i / rope.dims) for i in range(half)])
    angles = positions.double()[:, None, :, None] * frequencies.float().double()
    rotating = x[..., : rope.dims]
    first, second = rotating.split(half, -1)
    if rope.interleaved:
        first, second = rotating[..., 0::2], rotating[..., 1::2]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    pair = [turned.real, turned.imag]
    both = torch.stack(pair, -1).flatten(-2) if rope.interleaved else torch.cat(pair, -1)
    return torch.cat([both, x[..., rope.dims :]], -1)


def bloom_slopes(num_heads: int) -> list[float]:
    """As in transformers' build_alibi_tensor."""
    closest = 2 ** math.floor(math.log2(num_heads))
    base = 2.0 ** (-(2.0 ** -(math.log2(closest) - 3)))
    slopes = [base**i for i in range(1, closest + 1)]
    if closest != num_heads:
        extra = 2.0 ** (-(2.0 ** -(math.log2(2 * closest) - 3)))
        slopes += [extra**i for i in range(1, 2 * (num_heads - closest), 2)]
    return slopes


def head_norm(eps: float | None) -> NormSpec | None:
    """A norm of each head's features, or none."""
    return None if eps is None else NormSpec(HEAD_DIM, eps=eps)


def check_variants(tp: ParallelGroup) -> None:
    sequence = Partition.even(SEQUENCE, tp.size)
    positions: list[dict[str, RopeConfig | bool]] = [
        {"rope": ROPE},
        {},
        {"alibi": True},
        {"rope": RopeConfig(theta=100.0, dims=2)},
    ]
    for number, (counts, position) in enumerate(itertools.product(COUNTS, positions)):
        for window, eps, sp in ((None, None, False), (3, 1e-5, True), (None, 1e-5, number % 2)):
            layer = ParallelAttention(
                HIDDEN,
                HeadPartition.create(*counts, tp.size),
                HEAD_DIM,
                tp,
                qkv_bias=number % 2 == 0,
                output_bias=number % 2 == 0,
                window=window,
                query_norm=head_norm(eps),
                key_norm=head_norm(eps),
                sequence_parallel=bool(sp),
                dtype=FP64,
                **position,  # type: ignore[arg-type]
            )
            dense = DenseAttention(*counts, window=window, norm_eps=eps, **position)  # type: ignore[arg-type]
            x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
            compare(
                tp,
                layer,
                dense,
                x,
                f"{counts} {position} {window=} {eps=} {sp=}",
                x_spec=divided(x, 1, sequence) if sp else None,
                y_spec=(lambda y: divided(y, 1, sequence)) if sp else None,
                run=lambda x, layer=layer: layer(x, sequence=sequence),
            )


def check_norms_of_all_heads(tp: ParallelGroup) -> None:
    """Also where heads are uneven and two ranks hold the same keys."""
    sequence = Partition.even(SEQUENCE, tp.size)
    for counts, (centred, wide), sp in itertools.product(
        COUNTS, ((False, False), (False, True), (True, True)), (False, True)
    ):
        query, key = (NormSpec(n * HEAD_DIM, "rmsnorm", 1e-5, centred, wide) for n in counts)
        layer = ParallelAttention(
            HIDDEN,
            HeadPartition.create(*counts, tp.size),
            HEAD_DIM,
            tp,
            rope=ROPE,
            query_norm=query,
            key_norm=key,
            scale=0.3,
            sequence_parallel=sp,
            dtype=FP64,
        )
        dense = DenseAttention(
            *counts, rope=ROPE, norm_eps=1e-5, all_heads=True, centred=centred, scale=0.3
        )
        x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
        compare(
            tp,
            layer,
            dense,
            x,
            f"{counts} {centred=} {wide=} {sp=}",
            x_spec=divided(x, 1, sequence) if sp else None,
            y_spec=(lambda y: divided(y, 1, sequence)) if sp else None,
            run=lambda x, layer=layer: layer(x, sequence=sequence),
        )


def check_dropout(tp: ParallelGroup) -> None:
    """The mask is that of all heads on one device; in evaluation there is none."""
    key, p = 77, 0.4
    for counts, alibi, window in itertools.product(COUNTS, (False, True), (None, 3)):
        heads = HeadPartition.create(*counts, tp.size)
        layer = ParallelAttention(
            HIDDEN, heads, HEAD_DIM, tp, alibi=alibi, window=window, dropout=p, dtype=FP64
        )
        x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
        for dropout in ((key, p), None):
            layer.train(dropout is not None)
            dense = DenseAttention(*counts, alibi=alibi, window=window, dropout=dropout)
            what = f"{counts} {alibi=} {window=} {dropout=}"
            compare(tp, layer, dense, x, what, run=lambda x, a=layer: a(x, dropout_key=key))


def check_scores(tp: ParallelGroup) -> None:
    """Soft caps and sinks, with gradients; with a cache and in parts they give the same."""
    rope, sequence = replace(ROPE, interleaved=True), Partition.even(SEQUENCE, tp.size)
    kinds = ((1.5, False, None), (None, True, (77, 0.4)), (0.7, True, None))
    for number, (counts, kind) in enumerate(itertools.product(COUNTS, kinds)):
        softcap, sinks, dropout = kind
        window, sp, scale = (None, 3)[number % 2], number % 3 == 0, 0.9
        layer = ParallelAttention(
            HIDDEN,
            HeadPartition.create(*counts, tp.size),
            HEAD_DIM,
            tp,
            rope=rope,
            window=window,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout=dropout[1] if dropout else 0.0,
            sequence_parallel=sp,
            dtype=FP64,
        )
        options = {"rope": rope, "window": window, "scale": scale}
        dense = DenseAttention(*counts, softcap=softcap, sinks=sinks, dropout=dropout, **options)  # type: ignore[arg-type]
        x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
        for recompute in (False, True):
            compare(
                tp,
                layer,
                dense,
                x,
                f"{counts} {kind} {window=} {sp=} {recompute=}",
                x_spec=divided(x, 1, sequence) if sp else None,
                y_spec=(lambda y: divided(y, 1, sequence)) if sp else None,
                run=lambda x, a=layer, r=recompute: a(
                    x, sequence=sequence, dropout_key=77, recompute=r
                ),
            )
        if sp:
            continue
        weights = whole_weights(layer)
        place(layer, weights, tp.rank)
        layer.eval()
        whole = replace(dense, dropout=None)(weights, x)
        cache = Cache()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(scores, "_ELEMENTS", 2 * BATCH * SEQUENCE)
            steps = [layer(part, cache=cache) for part in x.split([4, 2, 1], 1)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-11, atol=1e-12)


def check_padding(tp: ParallelGroup) -> None:
    """Padding on the left and inside: positions count valid tokens, nobody looks at padding."""
    valid = torch.ones(BATCH, SEQUENCE, dtype=torch.bool)
    valid[0, :3] = False
    valid[1, 4] = False
    for position in ({"rope": ROPE}, {"alibi": True}, {}):
        for window in (None, 3):
            layer = ParallelAttention(
                HIDDEN,
                HeadPartition.create(5, 1, tp.size),
                HEAD_DIM,
                tp,
                window=window,
                dtype=FP64,
                **position,  # type: ignore[arg-type]
            )
            dense = DenseAttention(5, 1, window=window, valid=valid, **position)  # type: ignore[arg-type]

            def run(x: Tensor, layer: ParallelAttention = layer) -> Tensor:
                context = AttentionContext(SEQUENCE, key_valid=valid)
                return layer(x, context=context).masked_fill(~valid.unsqueeze(-1), 0)

            compare(
                tp,
                layer,
                lambda w, x, d=dense: d(w, x).masked_fill(~valid.unsqueeze(-1), 0),
                random(BATCH, SEQUENCE, HIDDEN).requires_grad_(),
                f"{position} {window=}",
                run=run,
            )


def check_packed(tp: ParallelGroup) -> None:
    """Positions that start again, as in several documents; the same for all layers."""
    for positions in (
        torch.tensor([[0, 1, 2, 0, 1, 0, 1]]),
        torch.tensor([[0, 1, 2, 3, 0, 1, 2], [5, 4, 3, 2, 1, 0, 9]]),
    ):
        for position in ({"rope": ROPE}, {"alibi": True}):
            for window, dropout in itertools.product((None, 3), (None, (7, 0.25))):
                layer = ParallelAttention(
                    HIDDEN,
                    HeadPartition.create(5, 1, tp.size),
                    HEAD_DIM,
                    tp,
                    window=window,
                    dropout=0.25 if dropout else 0.0,
                    dtype=FP64,
                    **position,  # type: ignore[arg-type]
                )

                def run(
                    x: Tensor, layer: ParallelAttention = layer, positions: Tensor = positions
                ) -> Tensor:
                    context = AttentionContext(SEQUENCE, positions=positions)
                    first = layer(x, context=context, dropout_key=7)
                    assert torch.equal(layer(x, context=context, dropout_key=7), first)
                    return first

                compare(
                    tp,
                    layer,
                    DenseAttention(
                        5,
                        1,
                        window=window,
                        dropout=dropout,
                        positions=positions,
                        **position,  # type: ignore[arg-type]
                    ),
                    random(BATCH, SEQUENCE, HIDDEN).requires_grad_(),
                    f"{positions} {position} {window=} {dropout=}",
                    run=run,
                )


class Cache:
    """The plainest key-value cache: one tensor that grows."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


@torch.no_grad()
def check_cache(tp: ParallelGroup) -> None:
    """A prompt, a chunk of it and single tokens give what the whole sequence gives."""
    for counts, position, window in itertools.product(
        COUNTS, ({"rope": ROPE}, {"alibi": True}), (None, 3)
    ):
        layer = ParallelAttention(
            HIDDEN,
            HeadPartition.create(*counts, tp.size),
            HEAD_DIM,
            tp,
            window=window,
            dtype=FP64,
            **position,  # type: ignore[arg-type]
        )
        weights = whole_weights(layer)
        place(layer, weights, tp.rank)
        x = random(BATCH, SEQUENCE, HIDDEN)
        cache = Cache()
        steps = [layer(part, cache=cache) for part in x.split([3, 2, 1, 1], 1)]
        whole = DenseAttention(*counts, window=window, **position)(weights, x)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-11, atol=1e-12)


def check_conversion(tp: ParallelGroup) -> None:
    """Narrowing a layer, or allocating it late, leaves its angles and slopes as they are."""
    heads = HeadPartition.create(12, 4, tp.size)
    for position in ({"rope": RopeConfig(theta=50.0, dims=HEAD_DIM)}, {"alibi": True}):

        def make(device: str, options: dict = position) -> ParallelAttention:  # type: ignore[type-arg]
            return ParallelAttention(HIDDEN, heads, HEAD_DIM, tp, device=device, **options)

        place = str(torch.get_default_device())
        plain, narrow = make(place), make(place).bfloat16()
        late = make("meta").to_empty(device=place)
        for name, table in plain.named_buffers():
            for other in (narrow, late):
                assert other.get_buffer(name).dtype == table.dtype
                assert torch.equal(other.get_buffer(name), table)
        tables = {"frequencies" if "rope" in position else "slopes"}
        if len(plain.runs) > 1:
            tables |= {"padded", "unpadded"}
        assert {name for name, _ in plain.named_buffers()} == tables
        assert not set(plain.state_dict()) & tables
        compare(
            tp,
            narrow,
            DenseAttention(12, 4, **position),  # type: ignore[arg-type]
            random(1, SEQUENCE, HIDDEN, dtype=torch.bfloat16).requires_grad_(),
            f"{position}",
        )


def check_refusals(tp: ParallelGroup) -> None:
    heads = HeadPartition.create(5, 1, tp.size)
    layer, cache = ParallelAttention(HIDDEN, heads, HEAD_DIM, tp, alibi=True), Cache()
    layer(torch.zeros(1, 3, HIDDEN), cache=cache)
    restarted = AttentionContext(2, past=3, positions=torch.arange(2).unsqueeze(0))
    with raises(ValueError, "ALiBi with explicit positions", "leave positions out"):
        layer(torch.zeros(1, 2, HIDDEN), context=restarted, cache=cache)
    with raises(ValueError, "positions should be [batch or 1, 4]", "(1, 3)"):
        AttentionContext(4, positions=torch.zeros(1, 3, dtype=torch.int64))
    norm = NormSpec(HEAD_DIM)
    with raises(ValueError, "queries and keys have norms both, or neither has one"):
        ParallelAttention(HIDDEN, heads, HEAD_DIM, tp, query_norm=norm)
    other = NormSpec(HEAD_DIM, "layernorm")
    with raises(ValueError, "a kind of layer that attention cannot handle", "layernorm"):
        ParallelAttention(HIDDEN, heads, HEAD_DIM, tp, query_norm=other, key_norm=other)
    for parts in (tp.size - 1, tp.size + 1):
        with raises(ValueError, f"over {parts} ranks", f"tp group of {tp.size}"):
            ParallelAttention(HIDDEN, HeadPartition.create(8, 2, parts), HEAD_DIM, tp)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check_variants)
    ranks(n, check_padding)
    ranks(n, check_packed)
    ranks(n, check_conversion)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_norms_of_all_heads(ranks: RankPool, n: int) -> None:
    ranks(n, check_norms_of_all_heads)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_soft_caps_and_sinks(ranks: RankPool, n: int) -> None:
    ranks(n, check_scores)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_dropout(ranks: RankPool, n: int) -> None:
    ranks(n, check_dropout)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_with_a_cache(ranks: RankPool, n: int) -> None:
    ranks(n, check_cache)


def test_heads_of_another_group_are_refused(ranks: RankPool) -> None:
    ranks(3, check_refusals)


def test_biases_and_masks_are_made_once_for_all_layers() -> None:
    context, heads = AttentionContext(SEQUENCE), Partition.even(5, 1)
    slopes = alibi_slopes(5)
    assert context.alibi(slopes, heads, None, FP64) is context.alibi(slopes, heads, None, FP64)
    assert context.full_mask(None) is context.full_mask(None)
    assert context.alibi(slopes, heads, 3, FP64) is not context.alibi(slopes, heads, None, FP64)
    assert context.full_mask(3).sum() == 3 * SEQUENCE - 3


def test_alibi_slopes_are_the_published_ones() -> None:
    for num_heads in range(1, 65):
        expected = torch.tensor(bloom_slopes(num_heads), dtype=torch.float64)
        assert torch.allclose(alibi_slopes(num_heads), expected, rtol=1e-14)
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def test_rope_frequencies_with_scaling() -> None:
    """Llama 3.1's published piecewise rule: keep, stretch, and interpolate in between."""
    rope = RopeConfig(5e5, 64, "llama3", 8.0, 1.0, 4.0, 8192)
    expected = []
    for i in range(32):
        frequency = 5e5 ** (-2 * i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 8.0
        elif wavelength >= 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8.0 + smooth * frequency
        expected.append(frequency)
    assert torch.allclose(rope_frequencies(rope), torch.tensor(expected), rtol=1e-6, atol=0)
    linear = rope_frequencies(RopeConfig(1e4, 8, "linear", 4.0))
    assert torch.equal(linear, rope_frequencies(RopeConfig(1e4, 8)) / 4)
