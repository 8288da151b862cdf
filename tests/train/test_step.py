"""Steps in every layout against one process of transformers and torch: loss, norm, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.train.batches import Order, Windows
from colrow.train.starting_model import set_dropout
from colrow.train.step import evaluate
from colrow.train.tokens import TokenFile
from tests.ranks import RankPool
from tests.train.layouts import (
    CLIP,
    CONFIG,
    LAYOUTS,
    RATE,
    STEPS,
    Layout,
    make_mesh,
    make_stepper,
    reference,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing-z": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "full": {"recompute": "full", "microbatch": 4},
    "selective": {"recompute": "selective", "microbatch": 1},
}


def take_steps(
    world: ParallelGroup, layout: Layout, tokens: Path, options: dict[str, Any]
) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses and norms, and the whole weights afterwards."""
    stepper = make_stepper(make_mesh(world, layout), layout, tokens, clip=CLIP, **options)
    found = [stepper.step(index, RATE) for index in range(STEPS)]
    whole = colrow.full_state_dict(stepper.model)
    return [(result.loss, result.grad_norm) for result in found], whole


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_norm_and_update_are_those_of_one_process(
    ranks: RankPool, tokens: Path, layout: Layout, variant: str
) -> None:
    options = VARIANTS[variant]
    expected, expected_weights = reference(tokens, **options)
    found, weights = ranks(layout.ranks, take_steps, layout, tokens, options)[0]
    assert expected[0][1] > 2 * CLIP  # the norm is clipped, and not by a little
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert norm == pytest.approx(expected_norm, rel=1e-10)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-8, atol=1e-11, msg=name)
    assert weights.keys() == expected_weights.keys()


def with_dropout(world: ParallelGroup, layout: Layout, tokens: Path) -> list[float]:
    # A mask belongs to a microbatch, so that all layouts need the same.
    options = {"microbatch": 2, "recompute": "full"}
    stepper = make_stepper(make_mesh(world, layout), layout, tokens, **options)
    set_dropout(stepper.model, 0.2)
    return [stepper.step(index, RATE).loss for index in range(STEPS)]


def test_dropout_drops_the_same_in_every_layout(ranks: RankPool, tokens: Path) -> None:
    expected = ranks(1, with_dropout, Layout(), tokens)[0]
    without = [loss for loss, _ in ranks(1, take_steps, Layout(), tokens, {})[0][0]]
    assert expected != pytest.approx(without, rel=1e-4)
    for layout in (LAYOUTS[2], LAYOUTS[6], LAYOUTS[8]):
        found = ranks(layout.ranks, with_dropout, layout, tokens)[0]
        assert found == pytest.approx(expected, rel=1e-12), layout


def held_out(world: ParallelGroup, layout: Layout, tokens: Path, sequences: int) -> float:
    mesh = make_mesh(world, layout)
    stepper = make_stepper(mesh, layout, tokens, label_smoothing=0.5, z_loss=1.0)
    windows = stepper.order.windows
    return evaluate(stepper.loss, mesh, windows, microbatch=2, sequences=sequences)


def test_evaluation_is_plain_loss_over_exactly_these_sequences(
    ranks: RankPool, tokens: Path
) -> None:
    model = colrow.from_config(CONFIG, seed=0, dtype=torch.float64).eval()
    ids, labels = Order(Windows.of(TokenFile.open(tokens), 17), 0).batch(0, 5)
    expected = model.loss(ids, labels).item()
    for layout in (LAYOUTS[0], LAYOUTS[5], LAYOUTS[6], LAYOUTS[8]):
        found = ranks(layout.ranks, held_out, layout, tokens, 5)  # no multiple of 2 x dp
        assert found == pytest.approx([expected] * layout.ranks, rel=1e-12), layout


def ends_in_nan(world: ParallelGroup, layout: Layout, tokens: Path) -> str:
    stepper = make_stepper(make_mesh(world, layout), layout, tokens)
    stepper.step(0, RATE)
    if stepper.mesh.tp.rank == 1:
        with torch.no_grad():
            stepper.model.blocks[1].mlp.down.weight[3, 5] = torch.nan
    with pytest.raises(RuntimeError) as caught:
        stepper.step(1, RATE)
    return str(caught.value)


def test_a_loss_that_is_not_a_number_names_the_step(ranks: RankPool, tokens: Path) -> None:
    for message in ranks(2, ends_in_nan, Layout(tp=2), tokens):
        assert "step 1: the loss is nan" in message
        assert "microbatch 0 is nan" in message


def bad_gradient(world: ParallelGroup, layout: Layout, tokens: Path) -> list[float]:
    """An infinite gradient on one rank alone; the weights must stay as they were."""
    stepper = make_stepper(make_mesh(world, layout), layout, tokens)
    weight = stepper.model.blocks[0].mlp.down.weight
    before = weight.detach().clone()
    if world.rank == 1:
        weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([2]), torch.inf))
    try:
        stepper.step(0, RATE)
    except RuntimeError as error:
        assert torch.equal(weight, before)
        return [str(error)]
    return []


def test_an_infinite_gradient_names_rank_and_parameter(ranks: RankPool, tokens: Path) -> None:
    for messages in ranks(2, bad_gradient, Layout(tp=2), tokens):
        assert "rank 1: " in messages[0]
        assert "of the gradient of blocks.0.mlp.down.weight are not finite" in messages[0]


def clip_own_module(world: ParallelGroup, limit: float) -> tuple[float, list[Tensor], list[Tensor]]:
    """A user's own module, colrow's layers beside torch's: norm, gradients and weights."""
    torch.manual_seed(0)
    module = nn.Sequential(
        colrow.ColumnParallelLinear(7, 11, world, bias=True, dtype=torch.float64),
        nn.GELU(),
        colrow.RowParallelLinear(11, 5, world, bias=True, dtype=torch.float64),
        nn.LayerNorm(5, dtype=torch.float64),
    )
    x = torch.arange(21, dtype=torch.float64).view(3, 7).sin()
    module(x).square().sum(-1).exp().sum().backward()
    norm = colrow.clip_grad_norm_(module, limit)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return norm.item(), grads, [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_clipping_in_a_module_of_ones_own(ranks: RankPool, limit: float) -> None:
    weights = ranks(1, clip_own_module, limit)[0][2]
    dense = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 5), nn.LayerNorm(5)).double()
    for parameter, weight in zip(dense.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    x = torch.arange(21, dtype=torch.float64).view(3, 7).sin()
    dense(x).square().sum(-1).exp().sum().backward()
    norm = nn.utils.clip_grad_norm_(dense.parameters(), limit).item()
    grads = [p.grad for p in dense.parameters() if p.grad is not None]
    for size in (1, 2, 3, 4):
        parts = ranks(size, clip_own_module, limit)
        assert [part[0] for part in parts] == pytest.approx([norm] * size, rel=1e-12)
        for index, dim in enumerate([0, 0, 1]):  # divided over the ranks
            whole = torch.cat([part[1][index] for part in parts], dim)
            torch.testing.assert_close(whole, grads[index], rtol=1e-10, atol=1e-14)
        for index in (3, 4, 5):  # held by each
            torch.testing.assert_close(parts[-1][1][index], grads[index], rtol=1e-10, atol=1e-14)


def bf16_losses(world: ParallelGroup, layout: Layout, tokens: Path) -> list[float]:
    stepper = make_stepper(
        make_mesh(world, layout),
        layout,
        tokens,
        dtype=torch.float32,
        compute_dtype=torch.bfloat16,
        recompute="full",
    )
    losses = [stepper.step(index, RATE).loss for index in range(STEPS)]
    for parameter in stepper.model.parameters():
        assert parameter.dtype == torch.float32
        assert all(v.dtype == torch.float32 for v in stepper.optimizer.state[parameter].values())
    return losses


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[6], LAYOUTS[8]], ids=str)
def test_bf16_computes_near_fp64_and_keeps_fp32_masters(
    ranks: RankPool, tokens: Path, layout: Layout
) -> None:
    expected = [loss for loss, _ in ranks(1, take_steps, Layout(), tokens, {})[0][0]]
    found = ranks(layout.ranks, bf16_losses, layout, tokens)[0]
    assert found == pytest.approx(expected, rel=2e-2)
    assert found != pytest.approx(expected, rel=1e-7)  # it did compute in 16 bits
