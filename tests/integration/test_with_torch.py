"""Models that were split in place, under what torch and transformers put on top of a model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.tiny_models.architectures import Architecture, build
from colrow.tiny_models.example_batch import batch
from colrow.train.clip import grad_norm
from colrow.verification.comparison import gradient_errors
from colrow.verification.reference import full_precision
from tests.ranks import RankPool, run_world

LLAMA = Architecture("llama")


def mesh_of(tp: ParallelGroup) -> Mesh:
    single = ParallelGroup.single
    return Mesh(tp, single("dp"), single("pp"), None, torch.get_default_device())


def whole_grads(exact: bool = True) -> tuple[float, dict[str, Tensor]]:
    model = build(LLAMA)
    with full_precision() if exact else nullcontext():
        loss = model(**batch(LLAMA, model)).loss
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def cut(inputs: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def step(tp: ParallelGroup, how: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients of the split model, treated as ``how`` says."""
    model: Any = colrow.parallelize(build(LLAMA), mesh_of(tp))
    inputs = batch(LLAMA, model)
    run: Any = model
    if how == "recomputed":  # outside the mode that widens fp32 to fp64, so neither may be in it
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**inputs).loss
        loss.backward()
        return loss.item(), colrow.full_grads(model)
    if how == "compile":
        run = torch.compile(model, backend="aot_eager")
    if how == "accumulation":
        with full_precision():
            for row in (slice(0, 1), slice(1, 2)):
                loss = run(**cut(inputs, row)).loss / 2
                loss.backward()
            loss = loss.detach() * 0 + model(**inputs).loss.detach()
        return loss.item(), colrow.full_grads(model)
    with full_precision():
        loss = run(**inputs).loss
        loss.backward()
    return loss.item(), colrow.full_grads(model)


@pytest.mark.parametrize(
    "how", ["recomputed", "accumulation", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_gradients_are_the_whole_models(ranks: RankPool, how: str) -> None:
    loss, grads = whole_grads(exact=how != "recomputed")
    ours, split = ranks(2, step, how, timeout=200)[0]
    limit = 1e-6 if how == "recomputed" else 1e-10  # norms are computed in fp32 there
    assert ours == pytest.approx(loss, rel=limit)
    assert max(gradient_errors(split, grads).values()) < limit


def hybrid(kind: str) -> tuple[float, dict[str, Tensor]]:
    """tp=2 x dp=2: each dp rank has one row of the batch."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    mesh = colrow.init_mesh(tp=2, device="cpu")
    model: Any = colrow.parallelize(build(LLAMA), mesh)
    inputs = cut(batch(LLAMA, model), slice(mesh.dp.rank, mesh.dp.rank + 1))
    wrapped: nn.Module = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model, process_group=mesh.dp.group)
    else:
        assert mesh.device_mesh is not None
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh.device_mesh["dp"])
        fully_shard(model, mesh=mesh.device_mesh["dp"])
    with full_precision():
        loss = wrapped(**inputs).loss
        loss.backward()
    return loss.item(), colrow.full_grads(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_data_parallelism_on_top_averages_whole_gradients(kind: str) -> None:
    # Both rows count equally many tokens, so the mean of the rows' losses is the batch's.
    loss, grads = whole_grads()
    results = run_world(4, hybrid, kind, timeout=120)
    losses = [results[0][0], results[2][0]]  # tp is innermost: ranks 0 and 2 have different rows
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-10)
    assert max(gradient_errors(results[0][1], grads).values()) < 1e-10


def norms(tp: ParallelGroup) -> tuple[float, float]:
    """The gradient's norm, and the norm of it that is left after clipping to 0.5."""
    model: Any = colrow.parallelize(build(LLAMA), mesh_of(tp))
    with full_precision():
        model(**batch(LLAMA, model)).loss.backward()
    before = colrow.clip_grad_norm_(model, 0.5)
    return before.item(), grad_norm(model).item()


def test_clipping_goes_by_the_norm_of_the_whole_gradient(ranks: RankPool) -> None:
    # On 3 ranks some hold the same KV head: its gradient counts once.
    _, grads = whole_grads()
    whole = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    for before, after in ranks(3, norms):
        assert before == pytest.approx(whole, rel=1e-10)
        assert after == pytest.approx(0.5, rel=1e-6)
