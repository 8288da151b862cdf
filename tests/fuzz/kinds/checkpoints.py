"""Training saved in one layout and continued in another; exports and what reads them."""

from __future__ import annotations

import shutil
from typing import Any

import torch
import torch.distributed as dist

import colrow
from colrow.any_model.export import write_hf_directory
from colrow.any_model.loading import alone, load_trained
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.train.parallel import parallelize
from tests.fuzz import compare
from tests.fuzz.case import Case, Fields, Kind, OneOf, World, grids
from tests.fuzz.decoders import LAYOUT, MODEL, make, options_of, tokens

_SIDE = {
    "grid": OneOf([]),
    "fsdp": OneOf([False, True]),
    "split": LAYOUT["split"],
    "sharding": OneOf([{}, {"sequence_parallel": True}]),
}


def fields(ranks: int) -> Fields:
    grid = OneOf([list(g) for g in grids(ranks)])
    side = Fields({**_SIDE, "grid": grid})
    return Fields(
        {
            **MODEL,
            "before": side,
            "after": side,
            "optimiser": OneOf(["adamw", "sgd", "plain"]),
            "export": OneOf([False, True]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    make(world, case)
    first = _Training(world, case, case["before"])
    first.step(0)
    checkpoints = TrainingCheckpoints(
        world.directory / "run" / "checkpoints", first.mesh, group=dist.group.WORLD
    )
    checkpoints.save(1, first.model, first.optimiser, {"known": [1, "two"]})
    checkpoints.wait()
    weights = colrow.full_state_dict(first.model)
    first.step(1)
    expected = colrow.full_state_dict(first.model)

    second = _Training(world, case, case["after"])
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(0.5)  # they are to be replaced
    checkpoints = TrainingCheckpoints(
        world.directory / "run" / "checkpoints", second.mesh, group=dist.group.WORLD
    )
    state = checkpoints.load(1, second.model, second.optimiser)
    wrong = [] if state == {"known": [1, "two"]} else [f"the state is {state}"]
    loaded = colrow.full_state_dict(second.model)
    second.step(1)
    continued = colrow.full_state_dict(second.model)
    if world.rank == 0:  # which is rank 0 of every grid
        for name, value in weights.items():
            if not torch.equal(loaded[name], value):
                wrong.append(f"{name} was not loaded as it was saved")
            what = f"continued {name}"
            wrong += compare.difference(what, continued[name], expected[name], 1e-9)
        if case["export"]:
            wrong += _exported(world, weights)
    world.barrier()
    return wrong


class _Training:
    """A model in a layout, with its optimiser; a step has the same global batch in all."""

    def __init__(self, world: World, case: Case, side: Case) -> None:
        pp, dp, tp = side["grid"]
        pp, dp = (1, pp * dp)  # pipelines have a kind of their own
        self.case, self.mesh = case, world.mesh(tp=tp, pp=pp)
        self.model = colrow.from_pretrained(
            world.directory / "model",
            self.mesh,
            dtype=torch.float64,
            **options_of({**side, "check_inputs": True}, tp),
        ).train()
        self.module = parallelize(self.model, self.mesh, fsdp=side["fsdp"])
        makers: dict[str, Any] = {
            "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.001, foreach=False),
            "sgd": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, foreach=False),
            "plain": lambda ps: torch.optim.SGD(ps, lr=0.01, foreach=False),
        }
        self.optimiser = makers[case["optimiser"]](list(self.model.parameters()))

    def step(self, number: int) -> None:
        """One step on 12 sequences, of which every dp rank has its share."""
        dp = self.mesh.dp
        ids = tokens(self.case, 12, 6, number)[dp.rank :: dp.size]
        (self.module(ids, ids) * (dp.size / 60)).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def _exported(world: World, weights: dict[str, torch.Tensor]) -> list[str]:
    """The run as a Hugging Face directory, read again."""
    model, directory = world.directory / "run" / "model", world.directory / "exported"
    shutil.copytree(
        world.directory / "model", model, ignore=shutil.ignore_patterns("*.safetensors")
    )
    trained, step = load_trained(world.directory / "run")
    wrong = [] if step == 1 else [f"the newest step is {step}"]
    write_hf_directory(trained, directory, model, torch.float64)
    again = colrow.full_state_dict(colrow.from_pretrained(directory, alone(), dtype=torch.float64))
    if again.keys() != weights.keys():
        wrong.append(f"exported are other tensors: {sorted(again.keys() ^ weights.keys())}")
    wrong += [f"{n} was exported otherwise" for n in again if not torch.equal(again[n], weights[n])]
    return wrong


CHECKPOINTS = Kind("checkpoints", fields, run, weight=1)
