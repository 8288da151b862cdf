"""Optimisers and hooks that were made before a model was split, against the model whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.inplace.analysis import analyse
from colrow.inplace.apply.parameters import keep_part, note_replaced
from colrow.inplace.split import carry_out
from colrow.inplace.weights.load import allocate
from colrow.partition import Partition, ShardSpec
from colrow.shards.steps import watch
from colrow.verification.reference import FullPrecision
from tests.inplace.test_parallelize import OwnModel, mesh_of
from tests.ranks import RankPool

STEPS = 3
IDS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(3))
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "fused": (torch.optim.Adam, {"lr": 1e-2, "fused": True}),
    "amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "foreach": True}),
    "momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "foreach": False}),
}


class Tied(OwnModel):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


def built(cls: type[OwnModel]) -> OwnModel:
    torch.manual_seed(0)
    return cls().double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(IDS).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    cls, options = OPTIMIZERS[name]
    named = dict(model.named_parameters())
    some = [named.pop("both.weight"), named.pop("norm.bias")]
    groups = [{"params": list(named.values())}, {"params": some, "weight_decay": 0.1}]
    made: Any = cls
    return made(groups, **options)  # type: ignore[no-any-return]


def run(tp: ParallelGroup | None, name: str, before: int, cls: type[OwnModel]) -> list[float]:
    """Losses of a run in which the model is split after some steps; not at all without ranks."""
    model = built(cls)
    optimizer = optimizer_of(name, model)
    shapes: list[Any] = []
    weight = model.mixed.weight
    weight.register_hook(lambda grad: grad * 2)
    weight.register_post_accumulate_grad_hook(lambda p: shapes.append(p.shape))
    losses = train(model, optimizer, before)
    kept = model(IDS)  # a graph that is alive
    model(IDS).sum().backward()  # half a step
    if tp is not None:
        mine = {n: p for n, p in model.named_parameters()}
        colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
        assert all(mine[n] is p for n, p in model.named_parameters())
        assert weight.shape != (60, 20)
    losses += train(model, optimizer, STEPS)
    assert len(shapes) == before + 1 + STEPS and shapes[-1] == weight.shape
    assert kept.shape == (2, 7, 31)
    if tp is not None and before:
        for parameter, state in optimizer.state.items():
            tensors = [s for s in state.values() if isinstance(s, Tensor) and s.dim()]
            assert all(s.shape == parameter.shape for s in tensors)
    return losses


def check(tp: ParallelGroup) -> dict[tuple[str, int, str], list[float]]:
    return {
        (name, before, cls.__name__): run(tp, name, before, cls)
        for name in OPTIMIZERS
        for before, cls in ((0, OwnModel), (2, Tied))
    }


def test_an_optimizer_made_before_goes_on_as_that_of_the_whole_model(ranks: RankPool) -> None:
    for found in ranks(2, check):
        for (name, before, cls), losses in found.items():
            expected = run(None, name, before, {"OwnModel": OwnModel, "Tied": Tied}[cls])
            assert losses == pytest.approx(expected, rel=1e-9), (name, before)


def check_whole_again(tp: ParallelGroup) -> None:
    model = built(Tied)
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    optimizer = optimizer_of("fused", model)
    train(model, optimizer, 1)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = analyse(model, tp.size, "auto", {"ids": IDS})
    record = carry_out(model, tp, found, found.vocabulary)
    assert model.mixed.weight.shape != after["mixed.weight"].shape
    record.restore()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, after[name])
        assert set(vars(parameter)) == set()
    train(model, optimizer, 1)


def test_a_split_that_is_undone_leaves_parameters_as_they_were(ranks: RankPool) -> None:
    ranks(2, check_whole_again)


def check_meta(tp: ParallelGroup) -> None:
    with torch.device("meta"):
        model = OwnModel().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
    optimizer.step()  # nothing was replaced yet
    allocate(model, lambda _, like: torch.zeros(like.shape, dtype=like.dtype))
    with pytest.raises(ValueError, match=r"make the optimiser after colrow\.parallelize"):
        optimizer.step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_an_optimizer_of_a_model_without_values_is_refused(ranks: RankPool) -> None:
    ranks(2, check_meta)


def check_ddp(tp: ParallelGroup) -> None:
    model = built(OwnModel)
    early = nn.parallel.DistributedDataParallel(model, process_group=tp.group)
    colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"before colrow\.parallelize split it"):
            early(IDS)


def test_ddp_that_was_made_before_is_refused(ranks: RankPool) -> None:
    ranks(2, check_ddp)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_parameter_forgets_the_shape_it_had_in_an_earlier_result(dtype: torch.dtype) -> None:
    """Also where everything is computed in fp64, as in references."""
    weight = nn.Parameter(torch.ones(6, 2, dtype=dtype))
    x = torch.ones(1, 2, dtype=dtype)
    with FullPrecision():
        undo = keep_part(weight, ShardSpec((6, 2), 0, (Partition.even(6, 2),)), 0)
        earlier = F.linear(x, weight)
        undo()
        (grad,) = torch.autograd.grad(F.linear(x, weight).sum(), [weight])
    assert grad.shape == (6, 2) and earlier.shape == (1, 3)


def test_compiled_steps_are_looked_at_too() -> None:
    layer, spec = nn.Linear(4, 6, bias=False), ShardSpec((6, 4), 0, (Partition.even(6, 2),))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    layer.weight.grad = torch.ones(6, 4)
    optimizer.step()
    keep_part(layer.weight, spec, 0)
    before = layer.weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close(layer.weight, before - 0.5 * 1.9)
    layer.weight_spec = spec  # type: ignore[assignment]
    watch(layer, ParallelGroup(torch.distributed.GroupMember.NON_GROUP_MEMBER, 0, 2))  # type: ignore[arg-type]
    whole = torch.optim.Muon(layer.parameters())
    with pytest.raises(ValueError, match=r"use colrow\.Muon"):
        torch.compile(whole.step, backend="eager")()
    note_replaced(layer.weight)
    with pytest.raises(ValueError, match="make the optimiser after"):
        torch.compile(optimizer.step, backend="eager")()
