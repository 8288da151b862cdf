"""Splits a model and keeps that only if it then gives what the whole model gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from colrow.comm.mesh import Mesh
from colrow.inplace.check import Observation, agreed_error, difference, limit_of
from colrow.inplace.look import Look, carry_out, class_name
from colrow.inplace.record import Record
from colrow.inplace.together import LeftAloneError, all_come
from colrow.inplace.vocabulary import VocabularyLayers


def split_checked(
    model: nn.Module,
    mesh: Mesh,
    found: Look,
    whole: Observation,
    observed: Callable[[Record], Observation],
) -> None:
    """Splits the model if it then gives what the whole gives, or as much of it as does.

    Raises:
        ValueError: when it does not; the model is as it was.
    """
    attempt = _Attempt(model, mesh, found, whole, observed)
    if not (first := attempt.split(found.vocabulary)):
        return attempt.settle()
    if not (second := attempt.split(VocabularyLayers({}, {}))):
        return attempt.settle()
    kept: list[str] = []
    for name in dict.fromkeys(class_name(model, n) for n in found.inference.proofs):
        if not attempt.split(found.vocabulary, [*kept, name], first):
            kept.append(name)
    if not attempt.split(found.vocabulary, kept, first):
        return attempt.settle()
    raise ValueError(
        f"{type(model).__name__} was split, but does not give what the whole model gives "
        f"({first}; without embedding and head: {second}); it is whole again"
    )


@dataclass
class _Attempt:
    """Splits a model, and makes it whole again before the next time."""

    model: nn.Module
    mesh: Mesh
    found: Look
    whole: Observation
    observed: Callable[[Record], Observation]
    record: Record | None = None

    def split(
        self, layers: VocabularyLayers, classes: Collection[str] | None = None, problem: str = ""
    ) -> str:
        """What is wrong, with the model whole again; or "" with the model split.

        Args:
            layers: those to divide over the vocabulary.
            classes: of modules whose layers may be split; all by default.
            problem: what is wrong when all are.
        """
        self._restore()
        look = self.found
        if classes is not None:
            look = look.only(classes, f"the model differs when it is split: {problem}")
        self.record = carry_out(self.model, self.mesh.tp, look, layers)
        error, where, raised = math.inf, "", ""
        try:
            try:
                error, where = difference(self.observed(self.record), self.whole, self.record)
            except LeftAloneError:
                raise
            except Exception as problem:  # whatever the model's code raises
                where = raised = f"{type(problem).__name__}: {problem}"
            all_come(raised, self.mesh.tp)
        except LeftAloneError:
            self._restore()
            raise
        worst = agreed_error(error, self.mesh.tp, self.mesh.device)
        if worst <= limit_of(self.model):
            return ""
        self._restore()
        return f"{where} is off by {worst:.1e}" if error < math.inf else where

    def _restore(self) -> None:
        if self.record is not None:
            self.record.restore()
            self.model.__dict__.pop("colrow_record", None)
        self.record = None

    def settle(self) -> None:
        """Keeps the model as it is now."""
        assert self.record is not None
        self.record.settle()
