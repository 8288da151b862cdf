"""Which optimisers are taken on shards, refused or warned of, and that those taken are right."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import colrow
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.group import ParallelGroup
from colrow.shards.optimizers import ELEMENTWISE, refuse_on_shards
from colrow.verification.reference import precision
from tests.optim import models
from tests.optim.models import decoder, expected, take_steps
from tests.ranks import RankPool
from tests.train.layouts import Layout, make_mesh

RATES = {"Rprop": 1e-3, "Adadelta": 1.0}


def elementwise(model: nn.Module, kind: type[Any]) -> models.Optimizers:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    if "eps" in kind.__init__.__annotations__:
        options["eps"] = 1e-4
    return [kind(model.parameters(), lr=RATES.get(kind.__name__, 1e-2), **options)]


for one in ELEMENTWISE:
    models.MAKERS[one.__name__] = lambda model, split, kind=one: elementwise(model, kind)


def all_elementwise(world: ParallelGroup) -> dict[str, Any]:
    found, ids = {}, models.batch()
    for kind in ELEMENTWISE:
        model: Any = decoder("qwen2", make_mesh(world, Layout(tp=world.size)), Layout())
        optimizers = elementwise(model, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            colrow.check_optimizer(optimizers[0], model)
        with precision(torch.float64):  # in which the whole model's optimiser keeps its numbers
            losses = take_steps(optimizers, lambda run=model: run.loss(ids, ids))
        found[kind.__name__] = losses, colrow.full_state_dict(model)
    return found


def test_elementwise_optimisers_are_those_of_the_whole_model(ranks: RankPool) -> None:
    found = ranks(3, all_elementwise)[0]
    for name, (losses, weights) in found.items():
        right = expected("qwen2", name, "decoder")
        assert losses == pytest.approx(right[0], rel=1e-11), name
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight, right[1][key], rtol=1e-8, atol=1e-10, msg=f"{name} {key}"
            )


class Lamb(torch.optim.SGD):
    """Named as a library's class."""

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


class PagedAdamW8bit(Lamb):
    pass


class AdamW_(torch.optim.AdamW):
    """The same steps under another name."""


class Own(torch.optim.AdamW):
    """Other steps."""

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


class LaProp(torch.optim.Optimizer):
    """Unknown."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


REFUSED = {
    "Muon": "colrow.Muon",
    "Adafactor": "colrow.Adafactor",
    "LBFGS": "AdamW",
    "Lamb": "AdamW",
    "PagedAdamW8bit": "AdamW",
}
NAMES = [
    *("SingleDeviceMuonWithAuxAdam", "NorMuon", "ForeachSOAP", "PSGDKron", "ScalableShampoo"),
    *("GaLoreAdamW", "APOLLOAdamW", "DAdaptAdam", "ProdigyPlusScheduleFree", "SGDLars"),
    *("EKFACOptimizer", "Adam_mini"),
]
UNKNOWN = ["Lion", "AdamWScheduleFree", "Sophia", "Lambda", "Adan"]


def test_optimisers_of_other_libraries_are_known_by_their_names() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    for name in NAMES:
        with pytest.raises(ValueError, match=f"^{name} .*shards of tensors"):
            refuse_on_shards(type(name, (LaProp,), {})(parameters))
    for name in UNKNOWN:
        with pytest.warns(UserWarning, match=f"does not know the optimiser {name}"):
            refuse_on_shards(type(name, (LaProp,), {})(parameters))


def verdicts(world: ParallelGroup, directory: Path) -> dict[str, str]:
    model: Any = decoder("qwen2", make_mesh(world, Layout(tp=world.size)), Layout())
    matrices, _ = models.hidden_matrices(model)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    kinds: list[Any] = [torch.optim.Adafactor, torch.optim.LBFGS, Lamb, PagedAdamW8bit]
    optimizers = {kind.__name__: kind(model.parameters()) for kind in kinds}
    optimizers["Muon"] = torch.optim.Muon(matrices)
    optimizers["same"] = AdamW_(model.parameters())
    optimizers["own"] = Own(model.parameters())
    optimizers["unknown"] = LaProp(model.parameters())
    optimizers["whole"] = torch.optim.Adafactor(norms)
    optimizers["colrow"] = colrow.Muon(matrices, model)
    found = {}
    for name, optimizer in optimizers.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                colrow.check_optimizer(optimizer, model)
                colrow.check_optimizer(optimizer, model)
                found[name] = "; ".join(f"warned: {w.message}" for w in caught)
            except ValueError as error:
                found[name] = str(error)
    checkpoints = TrainingCheckpoints(
        directory, make_mesh(world, Layout(tp=world.size)), group=world.group
    )
    try:
        checkpoints.save(1, model, optimizers["Muon"], {})
    except ValueError as error:
        found["checkpoint"] = str(error)
    state = optimizers["same"].state[matrices[0]]
    state["blocks"] = torch.zeros(3)
    try:
        checkpoints.save(1, model, optimizers["same"], {})
    except ValueError as error:
        found["state"] = str(error)
    return found


def test_others_are_refused_or_warned_of(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks(2, verdicts, tmp_path)[0]
    for name, instead in REFUSED.items():
        assert f"{name} " in found[name]
        assert "shards" in found[name]
        assert instead in found[name].split("use ")[1], name
    for name in ("own", "unknown"):
        assert found[name].count("warned") == 1
        assert "does not know the optimiser" in found[name]
    assert found["same"] == found["whole"] == found["colrow"] == ""
    assert found["checkpoint"] == found["Muon"]
    assert "AdamW_" in found["state"]
    assert "blocks.0.attention.qkv.weight" in found["state"]
    assert "'blocks'" in found["state"]
