"""What layers hold and send is what their descriptions say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from colrow import (
    ColumnParallelLinear,
    GateUpParallelLinear,
    HeadPartition,
    ParallelGroup,
    Partition,
    PositionEmbedding,
    QKVParallelLinear,
    RowParallelLinear,
    Sharding,
    VocabParallelEmbedding,
)
from colrow.comm.ledger import record
from colrow.layers.describe import (
    AttentionSpec,
    BlockSpec,
    ColumnSpec,
    EmbeddingSpec,
    ExpertsSpec,
    LatentAttentionSpec,
    MLPSpec,
    NormSpec,
    ParameterSpec,
    Part,
    RouterSpec,
    Routing,
    RowSpec,
    SinksSpec,
    TableSpec,
    parameters_of,
)
from colrow.layers.head_norm import head_norm
from colrow.layers.norm import hidden_norm
from colrow.layers.options import RopeConfig
from colrow.layers.router import Router
from colrow.layers.scores import Sinks
from colrow.layers.shared import SharedLayers
from colrow.models.compose import decoder
from colrow.models.decoder_parts import DecoderParts
from tests.layers.dense import parameter_specs, random
from tests.ranks import RankPool

BATCH, SEQUENCE, HIDDEN, HEAD_DIM, FFN, VOCABULARY = 2, 7, 12, 4, 10, 23
ITEM = 8  # bytes of an fp64 number
FP64 = torch.float64
SIZES: dict[str, Any] = {
    "family": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_layers": 1,
    "num_heads": 9,  # on two ranks both read the middle KV head
    "num_kv_heads": 3,
    "head_dim": HEAD_DIM,
    "ffn_size": FFN,
    "max_positions": 16,
    "rope": RopeConfig(theta=100.0, dims=HEAD_DIM),
}
ROPE_OF_TWO = RopeConfig(theta=100.0, dims=2)
BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one KV head": {"num_heads": 5, "num_kv_heads": 1, "qkv_bias": True, "windows": (3,)},
    "biases and LayerNorm": {
        "norm": "layernorm",
        "position": "alibi",
        "rope": None,
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "parallel_residual"), True),
        "gated": False,
        "activation": "gelu",
    },
    "norms of each head": {"qk_norm": "each_head", "attention_scale": 0.3},
    "norms of all heads": {"qk_norm": "all_heads", "norms": "after", "norm_wide": True},
    "norms of all heads, one KV head": {"qk_norm": "all_heads", "num_kv_heads": 1},
    "soft caps and sinks": {"attention_softcap": 2.0, "sinks": True},
    "one norm for both": {
        "norm": "layernorm",
        "norm_bias": False,
        "parallel_residual": True,
        "one_norm": True,
        "qk_norm": "by_head",
    },
    "norms around": {"norms": "around", "norm_centred": True, "norm_wide": True},
    "experts": {"experts": 4, "active_experts": 2, "num_heads": 4, "num_kv_heads": 4},
    "latent attention": {
        "latent": (6, 8, 4, 2, 5),
        "num_heads": 5,
        "num_kv_heads": 5,
        "rope": ROPE_OF_TWO,
    },
    "latent attention, queries as they are": {
        "latent": (0, 8, 4, 2, 5),
        "num_heads": 4,
        "num_kv_heads": 4,
        "rope": ROPE_OF_TWO,
    },
    "all that experts can have": {
        "experts": 4,
        "active_experts": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "expert_ffn_size": 7,
        "shared_ffn_size": 5,
        "shared_gate": True,
        "routing": Routing("sigmoid", bias=True, correction=True),
    },
}


def parts_alone(tp: ParallelGroup, sequence_parallel: bool) -> list[tuple[nn.Module, Part]]:
    """Every single layer and its description."""
    heads, ffn = HeadPartition.create(5, 1, tp.size), Partition.even(FFN, tp.size)
    query, key_value = heads.query.scaled(HEAD_DIM), heads.key_value.scaled(HEAD_DIM)
    vocab = Partition.even(VOCABULARY, tp.size)
    options: dict[str, Any] = {"sharding": Sharding(sequence_parallel), "dtype": FP64}
    found: list[tuple[nn.Module, Part]] = []
    for bias in (False, True):
        found += [
            (
                ColumnParallelLinear(HIDDEN, FFN, tp, bias=bias, **options),
                ColumnSpec(HIDDEN, (ffn,), bias),
            ),
            (
                GateUpParallelLinear(HIDDEN, ffn, tp, bias=bias, **options),
                ColumnSpec(HIDDEN, (ffn, ffn), bias),
            ),
            (
                QKVParallelLinear(HIDDEN, heads, HEAD_DIM, tp, bias=bias, **options),
                ColumnSpec(HIDDEN, (query, key_value, key_value), bias),
            ),
            (
                RowParallelLinear(FFN, HIDDEN, tp, bias=bias, **options),
                RowSpec(ffn, HIDDEN, bias),
            ),
        ]
    forms = (
        NormSpec(HIDDEN),
        NormSpec(HIDDEN, centred=True),
        NormSpec(HIDDEN, "layernorm"),
        NormSpec(HIDDEN, "layernorm", bias=False),
    )
    for norm in forms:
        layer = hidden_norm(norm, tp, divided_sequence=sequence_parallel, layer="", dtype=FP64)
        found.append((layer, norm))
    own = partial(NormSpec, HEAD_DIM, "layernorm", bias=False)
    for norm, divided, over_all in (
        (NormSpec(HEAD_DIM, by_head=True), heads.query, False),
        (NormSpec(5 * HEAD_DIM, partition=query), heads.query, True),
        (NormSpec(HEAD_DIM, partition=key_value), heads.key_value, True),
        (own(heads=5, partition=heads.query), heads.query, False),
        (own(heads=1, partition=heads.key_value), heads.key_value, False),
    ):
        layer = head_norm(norm, tp, divided, over_all=over_all, layer="", dtype=FP64)
        found.append((layer, norm))
    return [
        *found,
        (
            VocabParallelEmbedding(VOCABULARY, HIDDEN, tp, **options),
            EmbeddingSpec(vocab, HIDDEN),
        ),
        (PositionEmbedding(16, HIDDEN, tp, **options), TableSpec(16, HIDDEN)),
        (Router(HIDDEN, 4, 2, tp, dtype=FP64), RouterSpec(4, HIDDEN)),
        (Sinks(heads.query, tp, dtype=FP64), SinksSpec(heads.query)),
    ]


def check_parameters(
    tp: ParallelGroup, layer: nn.Module, described: Mapping[str, ParameterSpec], sp: bool
) -> None:
    """Names, shapes, who holds what, and of what the gradient is a sum."""
    what = f"{layer} {sp=}"
    assert {name: list(p.shape) for name, p in layer.named_parameters()} == {
        name: list(spec.shard.local_shape(tp.rank)) for name, spec in described.items()
    }, what
    assert parameter_specs(layer) == {n: spec.shard for n, spec in described.items()}, what
    names = {module: f"{name}." if name else "" for name, module in layer.named_modules()}
    shared = {
        names[one.module] + one.name: one.rows.total
        * math.prod(described[names[one.module] + one.name].shard.shape[1:])
        for one in SharedLayers(layer).all()
    }
    summed = {n: spec.summed_elements(sequence_parallel=sp) for n, spec in described.items()}
    assert shared == {name: count for name, count in summed.items() if count}, what


def sent(
    described: AttentionSpec | LatentAttentionSpec | MLPSpec | ExpertsSpec | BlockSpec,
    prefix: str,
    n: int,
    sp: bool,
    keep: bool,
) -> Counter[tuple[str, str, str, int]]:
    """(operation, phase, layer, bytes) that the exchanges of a description mean."""
    whole = BATCH * SEQUENCE * HIDDEN * ITEM
    split = BATCH * -(-SEQUENCE // n) * n * HIDDEN * ITEM
    meaning = {
        ("column", False): [("all_reduce", "backward", whole)],
        ("column", True): [("all_gather", "forward", split), ("reduce_scatter", "backward", split)],
        ("row", False): [("all_reduce", "forward", whole)],
        ("row", True): [("reduce_scatter", "forward", split), ("all_gather", "backward", split)],
    }
    found: Counter[tuple[str, str, str, int]] = Counter()
    for one in described.exchanges():
        size = one.numbers * BATCH * SEQUENCE * ITEM
        squares = [("all_reduce", phase, size) for phase in ("forward", "backward")]
        for op, phase, size in meaning.get((one.kind, sp), squares):
            found[op, phase, f"{prefix}.{one.layer}", size] += 1
        if one.kind == "column" and not keep and not one.keeps_input:
            found["all_gather", "backward", f"{prefix}.{one.layer}", split] += 1
    return found


def check_sent(
    tp: ParallelGroup,
    layer: Callable[..., torch.Tensor],
    expected: Counter[tuple[str, str, str, int]],
    summed: int,
    sp: bool,
    what: str,
) -> None:
    """Forward and backward send what is expected, and the sum of shared gradients at once."""
    sequence, x = Partition.even(SEQUENCE, tp.size), random(BATCH, SEQUENCE, HIDDEN)
    start, stop = sequence.bounds[tp.rank]
    x = (x[:, start:stop] if sp else x).clone().requires_grad_()
    with record(tp) as ledger:
        layer(x, sequence=sequence if sp else None).sum().backward()
    calls = Counter((c.op, c.phase, c.layer, c.bytes) for c in ledger.calls)
    if tp.size == 1:
        assert not calls, what
        return
    assert not expected - calls, what
    rest = [(op, phase, size) for op, phase, _, size in (calls - expected).elements()]
    assert rest == ([("all_reduce", "backward", summed * ITEM)] if summed else []), what


def check_single_layers(tp: ParallelGroup) -> None:
    for sp in (False, True):
        for layer, spec in parts_alone(tp, sp):
            check_parameters(tp, layer, spec.parameters(), sp)


def check_compositions(tp: ParallelGroup, name: str) -> None:
    config = decoder(**{**SIZES, **BLOCKS[name]})
    spec, division = config.blocks[0], config.divide(tp.size)
    assert isinstance(spec.attention, AttentionSpec | LatentAttentionSpec)
    for sp, keep in ((False, True), (True, True), (True, False)):
        torch.manual_seed(0)
        sharding, device = Sharding(sp, keep_gathered_input=keep), torch.get_default_device()
        block = DecoderParts(config, division, tp, sharding, device, FP64).block(0)
        for prefix, described, layer in (
            ("blocks.0", spec, block),
            ("blocks.0.attention", spec.attention, block.attention),
            ("blocks.0.mlp", spec.mlp, block.mlp),
        ):
            parameters = parameters_of(described.parts(division))
            check_parameters(tp, layer, parameters, sp)
            for number, parameter in enumerate(layer.parameters()):
                nn.init.constant_(parameter, 0.1 + 0.01 * number)
            summed = sum(p.summed_elements(sequence_parallel=sp) for p in parameters.values())
            expected = sent(described, prefix, tp.size, sp, keep)
            check_sent(tp, layer, expected, summed, sp, f"{name} {prefix} {sp=} {keep=}")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_single_layers_hold_what_they_say(ranks: RankPool, n: int) -> None:
    ranks(n, check_single_layers)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_compositions_hold_and_send_what_they_say(ranks: RankPool, n: int, name: str) -> None:
    ranks(n, check_compositions, name)


def test_what_is_not_known_is_refused() -> None:
    latent = LatentAttentionSpec(HIDDEN, 4, 6, 8, nope=4, rotated=2, value=4)
    config = replace(decoder(**SIZES), blocks=(BlockSpec(latent, MLPSpec(HIDDEN, FFN)),))
    alone, place = ParallelGroup.single(), torch.device("meta")
    parts = DecoderParts(config, config.divide(1), alone, Sharding(), place, FP64)
    with pytest.raises(ValueError, match="LatentAttentionSpec is a kind of layer that the decoder"):
        parts.block(0)
    with pytest.raises(ValueError, match="3 active of 2 experts"):
        ExpertsSpec(MLPSpec(HIDDEN, FFN), 2, 3)
    with pytest.raises(ValueError, match="a norm over 9 features of 4 query heads"):
        AttentionSpec(HIDDEN, 4, 4, HEAD_DIM, query_norm=NormSpec(9), key_norm=NormSpec(9))
