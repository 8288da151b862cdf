"""One decision of all ranks about a step whose gradients overflow in the shards of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.compat import local_tensor
from colrow.comm.group import ParallelGroup
from colrow.optim.scaler import GradScaler
from tests.pipeline import layouts as pipes
from tests.ranks import RankPool
from tests.train.layouts import Layout, make_mesh, make_stepper

STEPS = 5
OVERFLOWS = (1, 3)


def run_steps(
    model: nn.Sequential, scaler: torch.amp.GradScaler, how: str
) -> tuple[list[float], list[Tensor]]:
    """Steps of which some overflow in one row of the first layer; scales and weights after each."""
    first, last = model[0].parameters(), [*model[2].parameters()]
    if how == "two":
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD(first, lr=0.1),
            torch.optim.AdamW(last, lr=0.1),
        ]
    else:
        fused = how == "fused"
        optimizers = [torch.optim.AdamW([*first, *last], lr=0.1, fused=fused, foreach=False)]
    weight: Any = model[0].weight
    scales = []
    for step in range(STEPS):
        for part in range(2):  # accumulated
            x = torch.arange(21, dtype=torch.float32).view(3, 7).add(part + step).sin()
            scaler.scale(model(x).square().sum()).backward()
        if step in OVERFLOWS and weight.shape[0] > 6:  # of two ranks, or of one
            weight.grad[6] = torch.inf
        elif step in OVERFLOWS and getattr(model[0], "tp", ParallelGroup.single()).rank == 1:
            weight.grad[0] = torch.inf
        if how in ("clip", "two"):
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            if isinstance(scaler, GradScaler):
                colrow.clip_grad_norm_(model, 0.5)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales, [p.detach() for p in model.parameters()]


def split_steps(world: ParallelGroup, how: str) -> tuple[list[float], list[Tensor], dict[str, Any]]:
    model = nn.Sequential(
        colrow.ColumnParallelLinear(7, 11, world, bias=True),
        nn.GELU(),
        colrow.RowParallelLinear(11, 5, world, bias=True),
    )
    scaler = GradScaler(world, init_scale=8.0, growth_interval=2)
    scales, weights = run_steps(model, scaler, how)
    return scales, weights, scaler.state_dict()


def dense_steps(weights: list[Tensor], how: str) -> tuple[list[float], list[Tensor]]:
    model = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 5))
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    return run_steps(model, scaler, how)


def initial(world: ParallelGroup) -> list[Tensor]:
    first = colrow.ColumnParallelLinear(7, 11, world, bias=True)
    last = colrow.RowParallelLinear(11, 5, world, bias=True)
    return [p.detach() for layer in (first, last) for p in layer.parameters()]


@pytest.mark.parametrize("how", ["plain", "clip", "fused", "two"])
def test_all_ranks_skip_the_steps_that_one_process_skips(ranks: RankPool, how: str) -> None:
    expected, weights = dense_steps(ranks(1, initial)[0], how)
    assert len(set(expected)) > 2  # it grows and backs off
    parts = ranks(2, split_steps, how)
    for scales, _, state in parts:
        assert scales == expected
        assert state["scale"] == expected[-1]
    for index, dim in enumerate([0, 0, 1]):
        whole = torch.cat([part[1][index] for part in parts], dim)
        torch.testing.assert_close(whole, weights[index], rtol=1e-4, atol=1e-5)
    assert torch.equal(parts[0][1][3], parts[1][1][3])


def fp16_run(
    world: ParallelGroup, layout: Layout | pipes.Pipe, tokens: Path, directory: Path
) -> dict[str, Any]:
    """Five steps, an overflow on one rank in the second; then the last two from a checkpoint."""

    def stepper() -> Any:
        if isinstance(layout, pipes.Pipe):
            mesh = pipes.make_mesh(world, layout)
            made = pipes.make_stepper(
                mesh, layout, tokens, dtype=torch.float32, compute_dtype=torch.float16
            )
        else:
            mesh = make_mesh(world, layout)
            made = make_stepper(
                mesh, layout, tokens, dtype=torch.float32, compute_dtype=torch.float16
            )
        made.scaler = GradScaler(mesh, init_scale=2.0**12, growth_interval=3)
        return made

    run, results = stepper(), []
    checkpoints = TrainingCheckpoints(directory / str(layout), run.mesh, group=world.group)
    unscale = run.scaler.unscale_

    def overflow(optimizer: torch.optim.Optimizer) -> None:
        if len(results) == 1 and world.rank == world.size - 1:
            grads = [local_tensor(p.grad) for p in run.model.parameters() if p.grad is not None]
            next(grad for grad in grads if grad.numel()).view(-1)[0] = torch.inf
        unscale(optimizer)

    run.scaler.unscale_ = overflow
    for index in range(5):
        results.append(run.step(index, 1e-2))
        if index == 2:
            checkpoints.save(3, run.model, run.optimizer, {"scaler": run.scaler.state_dict()})
            checkpoints.wait()
    again = stepper()
    again.scaler.load_state_dict(checkpoints.load(3, again.model, again.optimizer)["scaler"])
    continued = [again.step(index, 1e-2).loss for index in (3, 4)]
    return {
        "losses": [result.loss for result in results],
        "skipped": [result.skipped for result in results],
        "continued": continued,
        "scale": (run.scaler.get_scale(), again.scaler.get_scale()),
        "dtypes": {p.dtype for p in run.model.parameters()},
    }


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2, fsdp=True), pipes.Pipe(), pipes.Pipe(tp=2)],
    ids=str,
)
def test_fp16_training_skips_together_and_continues_bitwise(
    ranks: RankPool, tokens: Path, tmp_path: Path, layout: Layout | pipes.Pipe
) -> None:
    found = ranks(layout.ranks, fp16_run, layout, tokens, tmp_path)
    for rank in found:
        assert rank["skipped"] == [False, True, False, False, False]
        assert rank["losses"] == found[0]["losses"]
        assert rank["continued"] == rank["losses"][3:]
        assert rank["scale"] == (2.0**12, 2.0**12)  # halved, then doubled after three steps
        assert rank["dtypes"] == {torch.float32}
    assert found[0]["losses"][4] < found[0]["losses"][0]
