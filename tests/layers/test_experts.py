"""A mixture of experts against dense torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import ParallelGroup, Partition, Sharding
from colrow.layers.describe import ExpertsSpec, MLPSpec
from colrow.layers.experts import ParallelExperts
from tests.layers.dense import Weights, compare, divided, raises, random
from tests.ranks import RankPool

BATCH, SEQUENCE, HIDDEN, FFN = 2, 7, 12, 10


def dense_experts(spec: ExpertsSpec, weights: Weights, x: Tensor) -> Tensor:
    """Every expert for every token; those that a token does not go to count nothing."""
    odds = (x @ weights["router.weight"].T).exp()
    odds = odds / odds.sum(-1, keepdim=True)
    smallest = odds.sort(-1, descending=True).values[..., spec.active - 1, None]
    share = odds * (odds >= smallest)
    share = share / share.sum(-1, keepdim=True)
    result = torch.zeros_like(x)
    for number in range(spec.count):
        hidden = x @ weights[f"experts.{number}.up.weight"].T
        if spec.expert.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden)
        down = hidden @ weights[f"experts.{number}.down.weight"].T
        result = result + share[..., number, None] * down
    return result


def check_experts(tp: ParallelGroup) -> None:
    """Of 24 experts, 14 tokens with two each leave some without a token."""
    even = Partition.even(SEQUENCE, tp.size)
    uneven = Partition.ratio(FFN, list(range(1, tp.size + 1)))
    forms = itertools.product(((4, 2), (24, 2), (3, 3)), (True, False), (False, True))
    for (count, active), gated, sp in forms:
        expert = MLPSpec(HIDDEN, FFN, "silu" if gated else "gelu", gated)
        spec = ExpertsSpec(expert, count, active)
        layer = ParallelExperts(
            spec, tp, partition=uneven, sharding=Sharding(sp), dtype=torch.float64
        )
        x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
        compare(
            tp,
            layer,
            lambda w, x, s=spec: dense_experts(s, w, x),
            x,
            f"{spec} {sp=}",
            x_spec=divided(x, 1, even) if sp else None,
            y_spec=(lambda y: divided(y, 1, even)) if sp else None,
            run=lambda x, layer=layer, sp=sp: layer(x, sequence=even if sp else None),
        )


def check_refusals(tp: ParallelGroup) -> None:
    expert = MLPSpec(HIDDEN, FFN)
    for spec in (
        ExpertsSpec(expert, 4, 2, shared=expert),
        ExpertsSpec(MLPSpec(HIDDEN, FFN, bias=True), 4, 2),
    ):
        with raises(ValueError, "experts with biases or shared ones are not computed"):
            ParallelExperts(spec, tp)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check_experts)


def test_what_is_not_computed_is_refused(ranks: RankPool) -> None:
    ranks(2, check_refusals)
