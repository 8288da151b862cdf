"""Decoders in DDP or FSDP2 with tp inside: accumulated gradients and steps, against one process."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

import colrow
from colrow.checkpoint.naming import hf_naming
from colrow.train.parallel import parallelize
from colrow.verification.reference import reference_names
from tests.fuzz import compare
from tests.fuzz.case import Case, Fields, Kind, OneOf, World, grids
from tests.fuzz.decoders import (
    LAYOUT,
    LIMIT,
    MODEL,
    make,
    options_of,
    tokens,
    whole_gradients,
    whole_loss,
)


def fields(ranks: int) -> Fields:
    grid = [list(g) for g in grids(ranks) if g[0] == 1]
    return Fields(
        {
            **MODEL,
            **LAYOUT,
            "grid": OneOf(grid[::-1]),
            "fsdp": OneOf([False, True]),
            "accumulate": OneOf([1, 2, 3]),
            "microbatch": OneOf([1, 2]),
            "length": OneOf([6, 2, 5, 9]),
            "recompute": OneOf(["none", "full", "selective"]),
            "smoothing": OneOf([0.0, 0.1]),
            "z_loss": OneOf([0.0, 0.01]),
            "clip": OneOf([0.0, 0.5]),
            "optimiser": OneOf(["sgd", "adamw"]),
            "ignored": OneOf([False, True]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    whole = make(world, case)
    _, dp, tp = case["grid"]
    mesh = world.mesh(tp=tp)
    model = colrow.from_pretrained(
        world.directory / "model", mesh, dtype=torch.float64, **options_of(case, tp)
    ).train()
    loss = parallelize(
        model,
        mesh,
        fsdp=case["fsdp"],
        recompute=case["recompute"],
        label_smoothing=case["smoothing"],
        z_loss=case["z_loss"],
    )
    makers = {
        "sgd": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, foreach=False),
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.001, foreach=False),
    }
    optimiser = makers[case["optimiser"]](list(model.parameters()))
    other = makers[case["optimiser"]](list(whole.parameters()))
    size, accumulate = case["microbatch"], case["accumulate"]
    wrong = []
    for step in range(2):
        ids = tokens(case, dp * accumulate * size, case["length"], step)
        labels = ids.clone()
        if case["ignored"]:
            labels[::2, 1] = -100
        every = list(zip(ids.split(size), labels.split(size), strict=True))
        mine = every[mesh.dp.rank :: dp]
        for number, pair in enumerate(mine):
            later = isinstance(loss, DistributedDataParallel) and number < len(mine) - 1
            with loss.no_sync() if later else nullcontext():  # type: ignore[operator]
                (loss(*pair) * dp).backward()
        for pair in every:
            part = whole_loss(whole, *pair, smoothing=case["smoothing"], z_loss=case["z_loss"])
            part.backward()
        grads = colrow.full_grads(model)
        if mesh.tp.rank == 0:
            what = f"step {step}: gradient of"
            wrong += compare.gradients(what, grads, whole_gradients(whole), LIMIT)
        if case["clip"]:
            norm = colrow.clip_grad_norm_(loss, case["clip"])
            wanted = torch.nn.utils.clip_grad_norm_(whole.parameters(), case["clip"])
            wrong += compare.difference(f"step {step}: norm", norm, wanted, LIMIT)
        optimiser.step()
        optimiser.zero_grad()
        other.step()
        other.zero_grad()
    weights = colrow.full_state_dict(model)
    if mesh.tp.rank == 0:
        theirs = reference_names(whole, whole.state_dict(), hf_naming(model.config))
        for name, value in weights.items():
            wrong += compare.difference(f"after two steps {name}", value, theirs[name], 1e-8)
    return wrong


DATA_PARALLEL = Kind("data_parallel", fields, run, weight=2)
