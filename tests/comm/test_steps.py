"""Ranks that update parameters differently are found out; what would make them is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from tests.optim.models import batch, decoder, hidden_matrices, of_transformers
from tests.ranks import RankPool
from tests.train.layouts import Layout, make_mesh

Loop = Callable[[Any, Mesh, Callable[[], Any]], None]


def torch_scaler(model: nn.Module, mesh: Mesh, loss: Callable[[], Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss()).backward()
    scaler.step(optimizer)


def torch_muon(model: nn.Module, mesh: Mesh, loss: Callable[[], Any]) -> None:
    loss().backward()
    torch.optim.Muon(hidden_matrices(model)[0]).step()


def torch_adafactor(model: nn.Module, mesh: Mesh, loss: Callable[[], Any]) -> None:
    loss().backward()
    torch.optim.Adafactor(model.parameters()).step()


def torch_clipping(model: nn.Module, mesh: Mesh, loss: Callable[[], Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    loss()


def skipped_step(model: nn.Module, mesh: Mesh, loss: Callable[[], Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss().backward()
    if mesh.tp.rank == 0:
        optimizer.step()
    loss()


def own_rate(model: nn.Module, mesh: Mesh, loss: Callable[[], Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(3):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        plateau.step(float(step if mesh.tp.rank == 0 else -step))
    loss()


def as_it_should_be(model: nn.Module, mesh: Mesh, loss: Callable[[], Any]) -> None:
    matrices, others = hidden_matrices(model)
    optimizers = [colrow.Muon(matrices, model), torch.optim.AdamW(others, lr=1e-3, fused=True)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[1], 10)
    scaler = colrow.GradScaler(mesh, "cpu", init_scale=8.0, growth_interval=1)
    for _ in range(3):
        for _ in range(2):
            scaler.scale(loss()).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        colrow.clip_grad_norm_(model, 0.1)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        schedule.step()
    loss()


ENDS: dict[Loop, str] = {
    torch_scaler: "RuntimeError: .*use colrow.GradScaler",
    torch_muon: "ValueError: Muon .*use colrow.Muon",
    torch_adafactor: "ValueError: Adafactor .*use colrow.Adafactor",
    torch_clipping: "ValueError: .*clipped by another norm",
    skipped_step: "ValueError: .*updated their parameters differently",
    own_rate: "ValueError: .*another learning rate",
    as_it_should_be: "nothing",
}


def run(world: ParallelGroup, in_place: bool) -> dict[str, str]:
    """How each loop ends on this rank."""
    found, ids = {}, batch()
    for loop in ENDS:
        tp = ParallelGroup(world.group, world.rank, world.size)  # with no steps of other loops
        mesh = make_mesh(tp, Layout(tp=world.size))
        torch.manual_seed(0)
        if in_place:
            model: Any = colrow.parallelize(of_transformers("phi3"), mesh)
            loss = lambda model=model: model(input_ids=ids, labels=ids).loss  # noqa: E731
        else:
            model = decoder("qwen2", mesh, Layout())
            loss = lambda model=model: model.loss(ids, ids)  # noqa: E731
        try:
            loop(model, mesh, loss)
            found[loop.__name__] = "nothing"
        except (ValueError, RuntimeError) as error:
            found[loop.__name__] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("in_place", [False, True], ids=["decoder", "in-place"])
def test_ranks_that_part_are_found_out(ranks: RankPool, in_place: bool) -> None:
    for found in ranks(2, run, in_place):
        for loop, pattern in ENDS.items():
            end = found[loop.__name__]
            assert re.match(pattern, end), f"{loop.__name__}: {end}"


def split_after_a_step(world: ParallelGroup) -> str:
    mesh = make_mesh(world, Layout(tp=world.size))
    colrow.parallelize(of_transformers("phi3"), mesh)  # from now on torch's hook is there
    model: Any = of_transformers("phi3")
    ids, optimizer = batch(), torch.optim.Muon(hidden_matrices(model)[0])
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
        model = colrow.parallelize(model, mesh)
    return "nothing"


def test_an_optimiser_that_stepped_before_the_split_is_looked_at_again(ranks: RankPool) -> None:
    assert all("use colrow.Muon" in found for found in ranks(2, split_after_a_step))
