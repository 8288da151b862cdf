"""A mixture of experts against dense torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import ParallelGroup, Partition, Sharding
from colrow.layers.describe import Division, ExpertsSpec, MLPSpec, Routing
from colrow.layers.experts import ParallelExperts
from colrow.layers.options import ClampedGate
from colrow.layers.router import RouterLosses
from tests.layers.dense import Weights, assert_close, compare, divided, random
from tests.ranks import RankPool

BATCH, SEQUENCE, HIDDEN, FFN = 2, 7, 12, 10
SILU, GELU = MLPSpec(HIDDEN, FFN), MLPSpec(HIDDEN, FFN, "gelu", gated=False)
BIASED = MLPSpec(HIDDEN, FFN, bias=True, clamped=ClampedGate(1.5, limit=0.4))
# 14 tokens with two experts each leave some of 24 without a token.
SPECS = {
    "few": ExpertsSpec(SILU, 4, 2),
    "many": ExpertsSpec(GELU, 24, 2),
    "all": ExpertsSpec(SILU, 3, 3),
    "as they are": ExpertsSpec(SILU, 5, 2, routing=Routing(normalised=False, scale=1.5)),
    "gpt-oss": ExpertsSpec(BIASED, 5, 2, routing=Routing("chosen", bias=True)),
    "groups": ExpertsSpec(
        SILU, 6, 2, MLPSpec(HIDDEN, 7), Routing(normalised=False, groups=3, active_groups=2)
    ),
    "corrected": ExpertsSpec(
        SILU,
        8,
        3,
        MLPSpec(HIDDEN, 7),
        Routing("sigmoid", True, 2.5, False, True, 2, 1, best_of_group=2, wide=True),
    ),
    "shared, gated": ExpertsSpec(SILU, 4, 3, MLPSpec(HIDDEN, 9), shared_gate=True),
}


def dense_mlp(spec: MLPSpec, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Without biases."""
    hidden = x @ up.T
    if spec.gated:
        gate, passed = hidden.chunk(2, -1)
        return (F.silu(gate) * passed) @ down.T
    return F.gelu(hidden) @ down.T


def biased_expert(x: Tensor, weights: Weights, number: int) -> Tensor:
    """gpt-oss's, written out."""
    gate, passed = (
        x @ weights["experts.up.weight"][number].T + weights["experts.up.bias"][number]
    ).chunk(2, -1)
    gate, passed = torch.minimum(gate, gate.new_tensor(0.4)), passed.clip(-0.4, 0.4)
    mixed = gate / (1 + (-1.5 * gate).exp()) * (1 + passed)
    return mixed @ weights["experts.down.weight"][number].T + weights["experts.down.bias"][number]


def shares(spec: ExpertsSpec, weights: Weights, x: Tensor) -> Tensor:
    """What each expert's result is multiplied by, ``[..., experts]``, token by token."""
    routing = spec.routing
    logits = x @ weights["router.weight"].T
    if routing.bias:
        logits = logits + weights["router.bias"]
    found = []
    for row in logits.reshape(-1, spec.count):
        odds = (
            row.exp() / row.exp().sum() if routing.scores != "sigmoid" else 1 / (1 + (-row).exp())
        )
        rated = odds.detach().clone()
        if routing.correction:
            rated += weights["router.correction"].detach()
        groups = list(rated.chunk(routing.groups))
        best = sorted(
            range(routing.groups),
            key=lambda g: -sum(sorted(groups[g].tolist())[-routing.best_of_group :]),
        )
        size = spec.count // routing.groups
        allowed = [
            e for g in best[: routing.active_groups] for e in range(g * size, g * size + size)
        ]
        chosen = sorted(allowed, key=lambda e: -rated[e].item())[: spec.active]
        mask = torch.zeros_like(row)
        mask[chosen] = 1.0
        kept = odds * mask
        if routing.normalised or routing.scores == "chosen":
            kept = kept / kept.sum()
        found.append(kept * routing.scale)
    return torch.stack(found).view(*x.shape[:-1], spec.count)


def dense_experts(spec: ExpertsSpec, weights: Weights, x: Tensor) -> Tensor:
    """Every expert for every token; those that a token does not go to count nothing."""
    share, result = shares(spec, weights, x), torch.zeros_like(x)
    for number in range(spec.count):
        if spec.expert.bias:
            one = biased_expert(x, weights, number)
        else:
            up, down = (weights[f"experts.{name}.weight"][number] for name in ("up", "down"))
            one = dense_mlp(spec.expert, x, up, down)
        result = result + share[..., number, None] * one
    if spec.shared is not None:
        own = dense_mlp(spec.shared, x, weights["shared.up.weight"], weights["shared.down.weight"])
        if spec.shared_gate:
            own = own / (1 + (-x @ weights["shared_gate.weight"].T).exp())
        result = result + own
    return result


def check_experts(tp: ParallelGroup) -> None:
    even = Partition.even(SEQUENCE, tp.size)
    division = Division(tp.size, tuple(range(1, tp.size + 1)))
    for name, spec in SPECS.items():
        for sp in (False, True):
            torch.manual_seed(0)
            layer = ParallelExperts(
                spec, tp, division=division, sharding=Sharding(sp), dtype=torch.float64
            )
            x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
            compare(
                tp,
                layer,
                lambda w, x, s=spec: dense_experts(s, w, x),
                x,
                f"{name} {sp=}",
                x_spec=divided(x, 1, even) if sp else None,
                y_spec=(lambda y: divided(y, 1, even)) if sp else None,
                run=lambda x, layer=layer, sp=sp: layer(x, sequence=even if sp else None),
            )


def check_losses(tp: ParallelGroup) -> None:
    """Of two layers with padding, and their gradients, which are sums over ranks."""
    layers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layer = ParallelExperts(SPECS["few"], tp, dtype=torch.float64)
        torch.nn.init.normal_(layer.router.weight)
        layers.append(layer)
    valid = torch.ones(BATCH, SEQUENCE, dtype=torch.bool)
    valid[0, :3] = False
    for mask in (None, valid):
        x = random(BATCH, SEQUENCE, HIDDEN).requires_grad_()
        losses = RouterLosses(2, mask, tp)
        for layer in layers:
            layer.zero_grad()
            layer(x, losses=losses)
        found = losses.total(0.5, 0.25)
        found.backward()
        whole = x.detach().clone().requires_grad_()
        routers = [layer.router.weight.detach().clone().requires_grad_() for layer in layers]
        logits = torch.stack([whole @ router.T for router in routers])
        if mask is not None:
            logits = logits[:, mask]
        odds = (logits - logits.logsumexp(-1, keepdim=True)).exp().reshape(-1, 4)
        counts = torch.zeros(4, dtype=torch.float64)
        for row in odds:
            counts[row.sort().indices[-2:]] += 1
        expected = 0.5 * 4 * (counts / len(odds) * odds.mean(0)).sum()
        expected = expected + 0.25 * logits.logsumexp(-1).square().mean()
        expected.backward()
        assert_close(found, expected, 1e-12, "losses")
        assert x.grad is not None and whole.grad is not None
        assert_close(x.grad, whole.grad, 1e-12, "gradient of the input")
        for layer, router in zip(layers, routers, strict=True):
            assert layer.router.weight.grad is not None and router.grad is not None
            assert_close(layer.router.weight.grad, router.grad, 1e-12, "gradient of a router")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_against_dense(ranks: RankPool, n: int) -> None:
    ranks(n, check_experts)


@pytest.mark.parametrize("n", [1, 3])
def test_losses_of_routers(ranks: RankPool, n: int) -> None:
    ranks(n, check_losses)


@pytest.mark.parametrize(
    ("active", "routing", "message"),
    [
        (0, Routing(), "0 active of 6 experts"),
        (7, Routing(), "7 active of 6 experts"),
        (1, Routing(groups=4), "cannot lie in 4 equal groups"),
        (1, Routing(groups=3, active_groups=4), "4 active of 3 groups"),
        (4, Routing(groups=3, active_groups=1), "4 active experts are more than 1 groups of 2"),
        (1, Routing(groups=6, active_groups=2, best_of_group=2), "the 2 best scores of a group"),
    ],
)
def test_what_no_router_can_choose(active: int, routing: Routing, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertsSpec(SILU, 6, active, routing=routing)
    with pytest.raises(ValueError, match="shared experts with biases are not computed"):
        ExpertsSpec(SILU, 6, 1, shared=BIASED)
