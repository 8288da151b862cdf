"""Layers of one's own in training checkpoints: what a store does not know it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.partition import Partition, ShardSpec
from colrow.shards.same import HeldTensor, problem_of
from colrow.train.clip import grad_norm
from tests.inplace.test_parallelize import OwnModel, mesh_of
from tests.ranks import RankPool

SIZE, WIDE = 6, 10


class HeadNorm(nn.Module):
    """Scales this rank's own features; says how they are divided only when asked to."""

    def __init__(self, tp: ParallelGroup, *, says: bool) -> None:
        super().__init__()
        partition = Partition.even(WIDE, tp.size)
        self.weight = nn.Parameter(torch.ones(partition.size(tp.rank)))
        if says:
            self.weight_spec = ShardSpec((WIDE,), 0, (partition,))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Own(nn.Module):
    def __init__(self, tp: ParallelGroup, *, says: bool) -> None:
        super().__init__()
        self.before = nn.Linear(SIZE, SIZE)
        self.average = nn.BatchNorm1d(SIZE)
        self.up = colrow.ColumnParallelLinear(SIZE, WIDE, tp, bias=True)
        self.norm = HeadNorm(tp, says=says)
        self.down = colrow.RowParallelLinear(WIDE, SIZE, tp, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.norm(self.up(self.average(self.before(x)))).tanh())
        return result


def made(tp: ParallelGroup, *, says: bool) -> tuple[Own, torch.optim.Optimizer]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = Own(tp, says=says)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    x = torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(count):
        loss = model(x).square().mean()
        loss.backward()
        losses += [loss.item(), grad_norm(model).item()]
        optimizer.step()
        optimizer.zero_grad()
    return losses


def save(tp: ParallelGroup, directory: Path) -> list[float]:
    """A run with a break; what is not said is refused on the way."""
    checkpoints = TrainingCheckpoints(directory, mesh_of(tp), group=tp.group)
    if tp.size > 1:
        silent, optimizer = made(tp, says=False)
        silent(torch.randn(8, SIZE)).square().mean().backward()
        with pytest.raises(ValueError, match=r"gradients: norm\.weight differ .* \(HeadNorm\)"):
            grad_norm(silent)
        optimizer.step()  # Adam's first step is as large on every rank, its states are not
        message = r"exp_avg of norm\.weight, .* norm \(HeadNorm\) an attribute weight_spec"
        with pytest.raises(ValueError, match=message):
            checkpoints.save(1, silent, optimizer, {})
        optimizer.step()
        assert not (directory / "step-00000001").exists()
    model, optimizer = made(tp, says=True)
    losses = steps(model, optimizer, 3)
    checkpoints.save(3, model, optimizer, {})
    checkpoints.wait()
    return losses + steps(model, optimizer, 2)


def load(tp: ParallelGroup, directory: Path) -> tuple[list[float], Tensor]:
    model, optimizer = made(tp, says=True)
    TrainingCheckpoints(directory, mesh_of(tp), group=tp.group).load(3, model, optimizer)
    state = torch.cat([model.average.running_var, model.average.num_batches_tracked[None]])
    return steps(model, optimizer, 2), state


def test_a_layer_that_says_how_it_is_divided_is_stored_whole(
    ranks: RankPool, tmp_path: Path
) -> None:
    alone = ranks(1, save, tmp_path / "1")[0]
    for losses in ranks(3, save, tmp_path / "3"):
        assert losses == pytest.approx(alone, rel=1e-10)
    for n, directory in ((3, "1"), (2, "3"), (1, "3"), (3, "3")):
        for losses, state in ranks(n, load, tmp_path / directory):
            assert losses == pytest.approx(alone[6:], rel=1e-10)
            assert state[-1] == 3 and (state[:-1] != 1).all()


class Silent(nn.Module):
    """A trainer's own layers alone, whose group nothing knows."""

    def __init__(self, tp: ParallelGroup) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 1.0 + tp.rank))
        self.register_buffer("seen", torch.zeros(2))


def refuse(tp: ParallelGroup, directory: Path) -> None:
    checkpoints = TrainingCheckpoints(directory, mesh_of(tp), group=tp.group)

    def refused(model: nn.Module, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            checkpoints.save(1, model, torch.optim.SGD(model.parameters()), {})

    def apart(name: str, by: float = 1e-3) -> Own:
        model, _ = made(tp, says=True)
        with torch.no_grad():
            model.get_parameter(name).mul_(1 + by * tp.rank)
        return model

    refused(Silent(tp), r"scale differ .* the module \(Silent\) an attribute scale_spec")
    refused(apart("before.weight"), r"before\.weight differ .*before \(Linear\)")
    refused(apart("before.bias", 1e-10), r"before\.bias differ")
    refused(apart("down.bias"), r"down\.bias should be the same on all ranks .* drifted apart")
    rounded = apart("before.weight", 1e-12)
    rounded.before.weight_spec = ShardSpec.replicated(SIZE, SIZE)  # type: ignore[assignment]
    refused(apart("before.weight", 1e-4), r"before\.weight differ")
    checkpoints.save(2, rounded, torch.optim.SGD(rounded.parameters()), {})
    checkpoints.wait()
    for name in ("running_mean", "num_batches_tracked"):
        model, _ = made(tp, says=True)
        model.average.get_buffer(name).add_(tp.rank)
        refused(model, rf"average\.{name} differ")
    model, _ = made(tp, says=True)
    uneven = nn.Linear(SIZE + tp.rank, 2)
    refused(nn.Sequential(model, uneven), r"1\.weight, 1\.bias differ")
    tied, _ = made(tp, says=True)
    first = nn.Sequential(nn.Linear(SIZE, 2, bias=False), tied)
    first[0].weight = tied.up.weight  # its first name is that of a layer that says nothing
    checkpoints.save(3, first, torch.optim.SGD(first.parameters()), {})
    checkpoints.wait()
    split = colrow.parallelize(
        OwnModel(), mesh_of(tp), example_inputs={"ids": torch.zeros(1, 4).long()}
    )
    colrow.full_state_dict(split)
    with torch.no_grad():
        split.get_parameter("norm.weight").add_(tp.rank)
    refused(split, r"norm\.weight should be the same")
    with pytest.raises(ValueError, match=r"norm\.weight should be the same"):
        colrow.full_state_dict(split)
    with torch.no_grad():
        split.get_parameter("norm.weight").fill_(1)
    added: Any = nn.Linear(3, 3)
    split.extra = added
    assert "extra.weight" in colrow.full_state_dict(split) or tp.rank
    added.weight.data.add_(tp.rank)
    added.bias.grad = torch.full((3,), float(tp.rank))
    for call in (colrow.full_state_dict, colrow.full_grads):
        with pytest.raises(ValueError, match=r"extra\.(weight|bias) differ .* \(Linear\)"):
            call(split)


def test_what_differs_between_ranks_is_refused_by_name(ranks: RankPool, tmp_path: Path) -> None:
    ranks(2, refuse, tmp_path)


def compare(tp: ParallelGroup) -> list[str]:
    """What is found in tensors that differ in one element, in order, or not at all."""
    found = []
    base = torch.randn(3, 400, generator=torch.Generator().manual_seed(2))
    other = base.clone()
    other[2, 7] += 0.1
    nan = other.clone()
    nan[0, 0] = float("nan")
    for mine in (base, other, base.flip(0), base.T, base.view(-1), None, base.bfloat16(), nan):
        held = [HeldTensor("a", base, False), HeldTensor("b", mine if tp.rank else base, True)]
        found.append(problem_of(held, tp))
    found.append(problem_of([HeldTensor("ab"[tp.rank], base, True)], tp))
    found.append(problem_of([HeldTensor("nan", base * float("nan"), False)], tp))
    assert primitives.all_reduce(torch.ones(1), tp).item() == tp.size
    return found


def test_comparisons(ranks: RankPool) -> None:
    for found in ranks(2, compare):
        assert [bool(text) for text in found] == [False, *[True] * 8, False]
        assert all(re.match("b should be the same", text) for text in found[1:8])
