"""Models of somebody's own, split by ``colrow.parallelize``, with batches that it never saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import colrow
from tests.fuzz import compare
from tests.fuzz.case import Case, Fields, Kind, NotRunError, OneOf, World
from tests.fuzz.grammar.model import MODEL, batch, build

# Rows, length, scale of the values, training: after the split, none as the one it was proven with.
FRESH = [
    (2, 6, 1.0, False),
    (3, 5, -1.0, True),
    (1, 11, 6.0, False),
    (2, 1, 0.05, True),
    (2, 7, -4.0, False),
]
_OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
_LIMIT = 1e-8


@dataclass
class Seen:
    """What a model gave for a batch, and its gradients.

    Attributes:
        alone: the result without gradients being recorded, in eval mode.
    """

    result: Any
    alone: Any
    loss: Tensor
    grads: dict[str, Tensor]


def fields(ranks: int) -> Fields:
    return Fields(
        {
            **MODEL,
            "optimiser": OneOf(list(_OPTIMISERS)),
            "loss": OneOf(["sum", "square"]),
            "seed": OneOf([0, 1, 2]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    model, whole = build(case, case["seed"]), build(case, case["seed"])
    random_in_training = any("dropout" in block["steps"] for block in case["blocks"])
    fresh = [f for f in FRESH if not (f[3] and random_in_training)]
    expected = [_whole(whole, case, number, *how) for number, how in enumerate(fresh)]
    if expected[0] is None:
        raise NotRunError("the whole model does not take this batch")
    optimiser = _OPTIMISERS[case["optimiser"]]
    last = len(fresh)
    _step(whole, case, optimiser)
    after = _whole(whole, case, last, *FRESH[0])

    example = batch(case, 99, 2, 6)
    colrow.parallelize(model, world.mesh(), example_inputs=example)
    wrong: list[str] = []
    try:
        for number, (how, seen) in enumerate(zip(fresh, expected, strict=True)):
            if seen is not None:
                _compare(model, case, number, how, seen, world, wrong)
        _step(model, case, optimiser)
        weights = colrow.full_state_dict(model)
        if world.rank == 0:
            wanted = {n: p.detach() for n, p in whole.named_parameters()}
            for name, value in wanted.items():
                if name not in weights:
                    wrong.append(f"after a step {name} is missing in full_state_dict")
                else:
                    wrong += compare.difference(f"after a step {name}", weights[name], value, 1e-7)
        buffers = dict(model.named_buffers())
        for name, value in whole.named_buffers():
            if name in buffers and buffers[name].shape == value.shape:
                wrong += compare.difference(f"the buffer {name}", buffers[name], value, _LIMIT)
        if after is not None:
            _compare(model, case, last, FRESH[0], after, world, wrong, 1e-6)
    except Exception:
        if wrong:  # a number that was wrong before is worse than what was refused then
            return wrong
        raise
    return wrong


def _whole(
    model: nn.Module, case: Case, number: int, rows: int, length: int, scale: float, train: bool
) -> Seen | None:
    """None where the whole model does not take this batch."""
    try:
        model.train(train)
        seen = _run(model, case, batch(case, number, rows, length, scale))
        seen.grads = _own_grads(model)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    finally:
        model.zero_grad()
    return seen if bool(seen.loss.isfinite()) else None


def _own_grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _run(model: nn.Module, case: Case, inputs: dict[str, Tensor]) -> Seen:
    alone = None
    if not model.training:
        with torch.no_grad():
            alone = model(**inputs)
    result = model(**inputs)
    loss = torch.zeros((), dtype=torch.float64)
    source = torch.Generator().manual_seed(3)
    for y in compare.flat(result):
        weights = torch.randn(y.shape, generator=source, dtype=torch.float64)
        loss = loss + (y * weights).sum()
        if case["loss"] == "square":
            loss = loss + y.square().mean()
    loss.backward()
    return Seen(result, alone, loss.detach(), {})


def _compare(
    model: nn.Module,
    case: Case,
    number: int,
    how: tuple[int, int, float, bool],
    whole: Seen,
    world: World,
    wrong: list[str],
    limit: float = _LIMIT,
) -> None:
    """Adds to ``wrong`` what differs."""
    rows, length, scale, train = how
    what = f"batch {number} ({rows}x{length}, scale {scale:g}, {'train' if train else 'eval'})"
    model.train(train)
    model.zero_grad()
    seen = _run(model, case, batch(case, number, rows, length, scale))
    wrong += compare.results(f"{what}: result", seen.result, whole.result, limit)
    wrong += compare.results(f"{what}: result in no_grad", seen.alone, whole.alone, limit)
    wrong += compare.difference(f"{what}: loss", seen.loss, whole.loss, limit, 1.0)
    grads = colrow.full_grads(model)
    model.zero_grad()
    if world.rank == 0:
        wrong += compare.gradients(f"{what}: gradient of", grads, whole.grads, limit)


def _step(model: nn.Module, case: Case, make: Any) -> None:
    """Two steps of an optimiser."""
    model.eval()
    optimiser = make(model.parameters())
    for number in range(2):
        optimiser.zero_grad()
        _run(model, case, batch(case, 50 + number, 2, 6))
        optimiser.step()
    optimiser.zero_grad()


IN_PLACE = Kind("in_place", fields, run, weight=4)
