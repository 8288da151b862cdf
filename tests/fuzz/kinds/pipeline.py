"""A step through a pipeline's stages: loss and gradients against transformers, whole."""

from __future__ import annotations

from dataclasses import replace

import torch

import colrow
from colrow.pipeline.limits import split_for
from colrow.pipeline.runner import PipelineRunner
from colrow.pipeline.schedules import SCHEDULES
from tests.fuzz import compare
from tests.fuzz.case import Case, Fields, Kind, OneOf, World, grids
from tests.fuzz.decoders import (
    LAYOUT,
    LIMIT,
    MODEL,
    config_of,
    make,
    options_of,
    tokens,
    whole_gradients,
    whole_loss,
)

# With the number of stages on a rank; 0 is the least.
_SCHEDULES = [*([name, 0] for name in SCHEDULES), ["zero-bubble", 2], ["gpipe", 2]]


def fields(ranks: int) -> Fields:
    grid = [list(g) for g in grids(ranks) if g[0] > 1]
    return Fields(
        {
            **MODEL,
            **LAYOUT,
            "layers": OneOf([4, 3, 5, 8]),
            "grid": OneOf(grid),
            "schedule": OneOf(_SCHEDULES),
            "layer_split": OneOf(["", "uneven", "shares"]),
            "microbatches": OneOf([4, 2, 3, 6, 1]),
            "microbatch": OneOf([1, 2]),
            "length": OneOf([6, 2, 5, 9]),
            "fsdp": OneOf([False, True]),
            "recompute": OneOf(["none", "none", "full", "selective"]),
            "smoothing": OneOf([0.0, 0.1]),
            "z_loss": OneOf([0.0, 0.01]),
            "ignored": OneOf([False, True]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    whole = make(world, case)
    pp, _, tp = case["grid"]
    schedule, stages = case["schedule"]
    mesh = world.mesh(tp=tp, pp=pp)
    count, size, length = case["microbatches"], case["microbatch"], case["length"]
    ids = tokens(case, mesh.dp.size * count * size, length)
    labels = ids.clone()
    if case["ignored"]:
        labels[::2, 1] = -100
    every = list(zip(ids.split(size), labels.split(size), strict=True))
    options = options_of(case, tp)
    if schedule in ("zero-bubble", "zbv"):
        options["sharding"] = replace(options["sharding"], overlap=False)
    split = split_for(config_of(whole), pp, schedule, _layers(case, pp), stages)
    model = colrow.from_pretrained(
        world.directory / "model", mesh, dtype=torch.float64, layer_split=split, **options
    ).train()
    runner = PipelineRunner(
        model,
        mesh,
        schedule,
        microbatches=count,
        microbatch=size,
        sequence=length,
        fsdp=case["fsdp"],
        recompute=case["recompute"],
        label_smoothing=case["smoothing"],
        z_loss=case["z_loss"],
    )
    mine = [(*pair, 0) for pair in every[mesh.dp.rank :: mesh.dp.size]]
    losses = runner.backward(mine, 0.25)
    grads = colrow.full_grads(model)
    expected = []
    for pair in every:
        loss = whole_loss(whole, *pair, smoothing=case["smoothing"], z_loss=case["z_loss"])
        (loss * 0.25).backward()
        expected.append(loss.detach())
    wrong = []
    if losses:
        theirs = torch.stack(expected[mesh.dp.rank :: mesh.dp.size])
        wrong += compare.difference("losses", torch.stack(losses), theirs, LIMIT)
    if mesh.tp.rank == 0 and mesh.pp.rank == 0:
        wrong += compare.gradients("gradient of", grads, whole_gradients(whole), LIMIT)
    return wrong


def _layers(case: Case, pp: int) -> str | None:
    """Layers of each stage as numbers or shares; None for what colrow finds balanced."""
    schedule, stages = case["schedule"]
    count = pp * (stages or (2 if schedule in ("interleaved", "zbv") else 1))
    layers = case["layers"]
    if not case["layer_split"] or layers < count:
        return None
    if case["layer_split"] == "shares":
        return ",".join(str(0.2 + 0.1 * (i % 2)) for i in range(count))
    return ",".join(str(n) for n in [layers - count + 1] + [1] * (count - 1))


PIPELINE = Kind("pipeline", fields, run, weight=2)
