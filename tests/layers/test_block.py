"""Whole blocks, and what must hold for layers in combination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from colrow import (
    HeadPartition,
    LayerNorm,
    ParallelAttention,
    ParallelBlock,
    ParallelGroup,
    ParallelMLP,
    Partition,
    RMSNorm,
    rng,
)
from colrow.layers.options import RopeConfig
from colrow.sharding import Sharding
from tests.layers.dense import (
    Weights,
    assert_close,
    compare,
    divided,
    parameter_specs,
    part,
    place,
    raises,
    random,
    whole_weights,
)
from tests.layers.test_attention import HEAD_DIM, DenseAttention, head_norm
from tests.layers.test_mlp import FFN, dense_mlp
from tests.ranks import RankError, RankPool

BATCH, SEQUENCE, HIDDEN = 2, 7, 12
ROPE = RopeConfig(theta=100.0, dims=HEAD_DIM)
LLAMA, NEOX = "llama", "neox"  # RMS norm, GQA, SwiGLU, serial; layer norm, biases, parallel


def make_block(
    tp: ParallelGroup, kind: str, *, sp: bool, dtype: torch.dtype = torch.float64, **options: Any
) -> ParallelBlock:
    llama, applied_to = kind == LLAMA, "shard" if sp else "all"
    place: dict[str, Any] = {"dtype": dtype, "sequence_parallel": sp}
    norm = RMSNorm if llama else LayerNorm
    dropout = options.pop("dropout", 0.0)
    return ParallelBlock(
        ParallelAttention(
            HIDDEN,
            HeadPartition.create(*((9, 3) if llama else (5, 5)), tp.size),
            HEAD_DIM,
            tp,
            rope=ROPE,
            qkv_bias=not llama,
            output_bias=not llama,
            query_norm=head_norm(1e-5 if llama else None),
            key_norm=head_norm(1e-5 if llama else None),
            dropout=dropout,
            layer="attention",
            **place,
            **options,
        ),
        ParallelMLP(
            HIDDEN,
            FFN,
            tp,
            activation="silu" if llama else "gelu",
            gated=llama,
            bias=not llama,
            layer="mlp",
            **place,
            **options,
        ),
        norm(HIDDEN, tp, eps=1e-5, applied_to=applied_to, dtype=dtype),
        norm(HIDDEN, tp, eps=1e-5, applied_to=applied_to, dtype=dtype),
        tp,
        parallel_residual=not llama,
        dropout=dropout,
    )


def dense_block(weights: Weights, x: Tensor, kind: str, dropout_key: int | None = None) -> Tensor:
    """``dropout_key``: with masks at p = 0.25 where the block documents them."""
    llama = kind == LLAMA

    def inner(name: str) -> Weights:
        return {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(name)}

    def norm(x: Tensor, name: str) -> Tensor:
        if llama:
            return F.rms_norm(x, (HIDDEN,), weights[f"{name}.weight"], 1e-5)
        return F.layer_norm(x, (HIDDEN,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def drop(x: Tensor, name: str) -> Tensor:
        if dropout_key is None:
            return x
        key = rng.derived_key(dropout_key, name)
        keep = rng.uniform(key, torch.arange(x.numel())).view(x.shape) >= 0.25
        return x * keep / 0.75

    masks = None if dropout_key is None else (int(rng.derived_key(dropout_key, "weights")), 0.25)
    attention = (
        DenseAttention(9, 3, rope=ROPE, norm_eps=1e-5, dropout=masks)
        if llama
        else DenseAttention(5, 5, rope=ROPE, dropout=masks)
    )
    mlp = dense_mlp("silu" if llama else "gelu", gated=llama)
    attended = attention(inner("attention"), norm(x, "attention_norm"))
    residual = x + drop(attended, "attention")
    expanded = mlp(inner("mlp"), norm(residual if llama else x, "mlp_norm"))
    return residual + drop(expanded, "mlp")


def compare_block(
    tp: ParallelGroup,
    kind: str,
    sp: bool,
    *,
    key: int | None = None,
    run: Any = None,
    prepare: Callable[[ParallelBlock], None] | None = None,
    tell: bool = True,
    **options: Any,
) -> None:
    """``prepare``: what happens to the block first. ``tell``: how the sequence is divided."""
    sequence = Partition.even(SEQUENCE, tp.size)
    block = make_block(tp, kind, sp=sp, dropout=0.0 if key is None else 0.25, **options)
    if prepare:
        prepare(block)
    arguments: dict[str, Any] = {"sequence": sequence if sp and tell else None, "dropout_key": key}
    x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
    compare(
        tp,
        block,
        lambda w, x: dense_block(w, x, kind, key),
        x,
        f"{kind} {sp=} {key=} {options}",
        x_spec=divided(x, 1, sequence) if sp else None,
        y_spec=(lambda y: divided(y, 1, sequence)) if sp else None,
        run=lambda x: run(block, x, **arguments) if run else block(x, **arguments),
    )


def check_block(tp: ParallelGroup) -> None:
    for kind in (LLAMA, NEOX):
        for sp in (False, True):
            compare_block(tp, kind, sp)
            compare_block(tp, kind, sp, sharding=Sharding(overlap=False))
            compare_block(tp, kind, sp, key=99)
        compare_block(tp, kind, True, key=99, tell=False)
        compare_block(tp, kind, True, sharding=Sharding(keep_gathered_input=False))


def converted(block: ParallelBlock) -> None:
    block.float().double()


def moved(block: ParallelBlock) -> None:
    block.to("meta").to_empty(device=torch.get_default_device())


def assigned(block: ParallelBlock) -> None:
    values = {name: value.clone() for name, value in block.state_dict().items()}
    block.load_state_dict(values, assign=True)


def exchanged(block: ParallelBlock) -> None:
    """A norm that was not there when the block was made."""
    norm = block.mlp_norm
    assert isinstance(norm, RMSNorm | LayerNorm)
    block.mlp_norm = type(norm)(
        HIDDEN, block.tp, eps=1e-5, applied_to=norm.applied_to, dtype=torch.float64
    )


def check_replaced_parameters(tp: ParallelGroup) -> None:
    """Parameters and layers that are not those of the constructor have their gradients summed."""
    for kind in (LLAMA, NEOX):
        for prepare in (converted, moved, assigned, exchanged):
            compare_block(tp, kind, True, prepare=prepare)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def check_parametrized(tp: ParallelGroup) -> None:
    """A weight that is computed from another one: its gradient is summed over its holders too."""
    for kind in (LLAMA, NEOX):
        plain, computed = make_block(tp, kind, sp=True), make_block(tp, kind, sp=True)
        weights = whole_weights(plain)
        place(plain, weights, tp.rank)
        place(computed, weights, tp.rank)
        places = ["attention.qkv", "attention.output", "attention_norm", "mlp_norm"]
        if kind == LLAMA:
            places += ["attention.query_norm", "attention.key_norm"]
        for name in places:
            module = computed.get_submodule(name)
            module.get_parameter("weight").data.div_(2)
            parametrize.register_parametrization(module, "weight", Doubled())
        sequence = Partition.even(SEQUENCE, tp.size)
        x = random(BATCH, SEQUENCE, HIDDEN)
        x = part(x, divided(x, 1, sequence), tp.rank)
        results = [block(x, sequence=sequence) for block in (plain, computed)]
        assert_close(results[1], results[0], 1e-14, kind)
        for result in results:
            result.square().sum().backward()
        for name in places:
            expected = plain.get_submodule(name).get_parameter("weight").grad
            original = computed.get_submodule(f"{name}.parametrizations.weight")
            actual = original.get_parameter("original").grad
            assert expected is not None and actual is not None
            assert_close(actual, 2 * expected, 1e-12, f"{kind} {name}")
        # Alone, without a model's bucket around them.
        for name in ("attention.qkv", "attention_norm"):
            module = computed.get_submodule(name)
            original = module.get_submodule("parametrizations.weight").get_parameter("original")
            original.grad = None
            module(x).sum().backward()
            layer = plain.get_submodule(name)
            layer.zero_grad()
            layer(x).sum().backward()
            expected = layer.get_parameter("weight").grad
            assert original.grad is not None and expected is not None
            assert_close(original.grad, 2 * expected, 1e-12, f"{kind} {name} alone")


def with_different_generators(tp: ParallelGroup, name: str) -> None:
    block = make_block(tp, LLAMA, sp=False, dropout=0.25)
    x = random(BATCH, SEQUENCE, HIDDEN)
    torch.manual_seed(tp.rank)
    (block.get_submodule(name) if name else block)(x)


def check_recomputed(tp: ParallelGroup) -> None:
    """Activation checkpointing: the same numbers, with dropout masks drawn again the same."""

    def run(block: nn.Module, x: Tensor, **arguments: Any) -> Tensor:
        y: Tensor = checkpoint(block, x, use_reentrant=False, **arguments)
        return y

    for kind in (LLAMA, NEOX):
        for sp in (False, True):
            compare_block(tp, kind, sp, run=run)
            compare_block(tp, kind, sp, run=run, key=99)
    block = make_block(tp, LLAMA, sp=False, dropout=0.25)  # masks from torch's generator
    place(block, whole_weights(block), tp.rank)
    grads = []
    for call in (lambda x: block(x), lambda x: run(block, x)):
        torch.manual_seed(5)
        block.zero_grad()
        call(random(BATCH, SEQUENCE, HIDDEN)).square().sum().backward()
        grads.append([p.grad for p in block.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def check_accumulation(tp: ParallelGroup) -> None:
    """Two microbatches add up to the gradient of both, in parameters that ranks share too."""
    sequence = Partition.even(SEQUENCE, tp.size)
    for kind in (LLAMA, NEOX):
        for sp in (False, True):
            block = make_block(tp, kind, sp=sp)
            weights = whole_weights(block)
            place(block, weights, tp.rank)
            x = random(BATCH, SEQUENCE, HIDDEN)
            dense_block(weights, x, kind).square().sum().backward()
            for microbatch in x.split(1):
                local = part(microbatch, divided(microbatch, 1, sequence), tp.rank)
                y = block(local if sp else microbatch, sequence=sequence if sp else None)
                y.square().sum().backward()
            for name, spec in parameter_specs(block).items():
                parameter, whole = block.get_parameter(name), weights[name].grad
                assert parameter.grad is not None and whole is not None
                assert_close(parameter.grad, part(whole, spec, tp.rank), 1e-12, f"{kind} {name}")


def check_refusals(tp: ParallelGroup) -> None:
    plain, split = make_block(tp, LLAMA, sp=False), make_block(tp, LLAMA, sp=True)
    with raises(ValueError, "agree on sequence_parallel"):
        ParallelBlock(split.attention, plain.mlp, plain.mlp_norm, plain.mlp_norm, tp)
    with raises(ValueError, "applied_to='shard'"):
        ParallelBlock(split.attention, split.mlp, plain.mlp_norm, split.mlp_norm, tp)
    with raises(ValueError, "applied_to='all'"):
        ParallelBlock(plain.attention, plain.mlp, plain.mlp_norm, split.mlp_norm, tp)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check_block)


@pytest.mark.parametrize("n", [2, 3])
def test_replaced_and_computed_parameters(ranks: RankPool, n: int) -> None:
    ranks(n, check_replaced_parameters)
    ranks(n, check_parametrized)


@pytest.mark.parametrize("name", ["", "attention"])
@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_dropout_masks_from_different_generators(ranks: RankPool, name: str) -> None:
    with pytest.raises(RankError, match="would draw different dropout masks") as caught:
        ranks(2, with_different_generators, name)
    assert set(caught.value.errors) == {0, 1}


@pytest.mark.parametrize("n", [2, 3])
def test_with_activation_checkpointing(ranks: RankPool, n: int) -> None:
    ranks(n, check_recomputed)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradients_of_microbatches_accumulate(ranks: RankPool, n: int) -> None:
    ranks(n, check_accumulation)


def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    ranks(2, check_refusals)


def test_what_is_added_can_be_scaled() -> None:
    block = make_block(ParallelGroup.single(), NEOX, sp=False)
    x = random(BATCH, SEQUENCE, HIDDEN)
    added = block(x) - x  # of a parallel residual, which is linear in it
    block.residual_scale = 0.25
    torch.testing.assert_close(block(x), x + 0.25 * added)
