"""Whether a forward pass decides anything by values of which each rank has a part.

A module that does is not split: its ranks might go different ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from colrow.inplace.observe.unit import Unit, UnitError
from colrow.inplace.observe.watch import AnswerStyle, ValueWatch

Run = TypeVar("Run")


class DecisionError(Exception):
    """The forward decides by values that are others on each rank; the message says where."""


def check_decisions(
    survey: ValueWatch,
    ranks: int,
    run: Callable[[ValueWatch, Run | None], Run],
    differs: Callable[[Run, Run, int], str],
) -> list[tuple[AnswerStyle, Run]]:
    """Runs the whole with each rank's values kept and the others changed, and compares.

    Args:
        survey: a forward of the whole that was watched.
        run: a watched forward of the whole; of a second one the sums over ranks are those of the
            run that it is given.
        differs: what of a rank's own part is not in the first run what it is in the second; "" for
            nothing.

    Returns:
        The whole as it runs when comparisons are answered otherwise, by the way that they are;
        nothing for a forward without any.

    Raises:
        DecisionError: when a number, a comparison or a choice depends on more than a rank holds.
    """
    if survey.problem:
        raise DecisionError(survey.problem)
    if not survey.decided:
        return []
    found = []
    with torch.no_grad():
        for style, watch, base in _answered(run):
            mixed: list[Tensor] = []
            wrong = ""
            for rank in range(ranks):
                moved = ValueWatch(style, watch, rank)
                try:
                    other = run(moved, base)
                except UnitError as error:
                    raise DecisionError(f"it fails for other values: {error}") from None
                changed = moved.changed()
                if changed is None:
                    raise DecisionError("it takes another way for other values")
                wrong = wrong or differs(other, base, rank)
                mixed = [a & b for a, b in zip(mixed, changed, strict=True)] if rank else changed
            for record, some in zip(watch.records, mixed, strict=True):
                if some.any():
                    raise DecisionError(
                        f"its forward decides by values of which a rank has a part: {record.place}"
                    )
            if wrong:
                raise DecisionError(f"{wrong} depends on values of other ranks")
            found.append((style, base))
    return found


def check_memory(unit: Unit, run: Callable[[ValueWatch], object]) -> bool:
    """Whether forward passes keep divided values, and whether later ones use them.

    Such are running statistics, a scale for the next pass, a list of results outside of the module.

    Args:
        run: a forward of the whole that is watched.

    Returns:
        Whether something divided is kept, for others to use.

    Raises:
        DecisionError: when a pass uses it, in training or not.
    """
    before, kept = unit.training, False
    with torch.no_grad():
        try:
            for unit.training in (False, True):
                watch = ValueWatch()
                with suppress(UnitError):
                    run(watch)
                kept |= watch.outlives()
            earlier: ValueWatch | None = None
            for unit.training in (False, False, True, True, False) if kept else ():
                watch = ValueWatch(after=earlier)
                with suppress(UnitError):
                    run(watch)
                if watch.problem:
                    raise DecisionError(watch.problem)
                earlier = watch
        finally:
            unit.training = before
    return kept


def _answered(
    run: Callable[[ValueWatch, Run | None], Run],
) -> Iterator[tuple[AnswerStyle, ValueWatch, Run]]:
    """The whole, run with comparisons answered in every way that may matter."""
    styles = [AnswerStyle(0)]
    for style in styles:
        watch = ValueWatch(style)
        try:
            base = run(watch, None)
        except UnitError:  # of answers that its code does not expect
            continue
        if len(styles) == 1 and watch.places:
            styles += (
                [AnswerStyle(1), AnswerStyle(2), AnswerStyle(3)]
                if len(watch.places) > 1
                else [AnswerStyle(1)]
            )
            if watch.ragged:
                styles.append(AnswerStyle(1, flips=False))
        yield style, watch, base
