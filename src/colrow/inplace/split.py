"""Splits a model as it was analysed, and keeps that only if it then gives what the whole gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.inplace.analysis import Analysis, class_name
from colrow.inplace.apply.agreement import LeftAloneError, all_arrive
from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.fused_kernels import avoid_fused_kernels
from colrow.inplace.apply.guards import guard_unseen
from colrow.inplace.apply.lora import split_adapters
from colrow.inplace.apply.record import SplitRecord
from colrow.inplace.apply.refusals import refuse_attention_weights, refuse_what_needs_whole_weights
from colrow.inplace.apply.sequence import split_stacks
from colrow.inplace.apply.whole_results import split_gathered, split_loss, split_vocabulary
from colrow.inplace.check import Evaluation, agreed_error, difference, limit_of
from colrow.inplace.find.whole_results import VocabularyLayers
from colrow.inplace.observe.linear_layers import adapted_layers, without_adapters


def carry_out(
    model: nn.Module, tp: ParallelGroup, found: Analysis, vocabulary: VocabularyLayers
) -> SplitRecord:
    """Splits the model as found, with these layers divided over the vocabulary."""
    record = SplitRecord(tp)
    model.__dict__["colrow_record"] = record
    applier = Applier(model, record)
    adapted = adapted_layers(model)
    with without_adapters(model):
        for name, proofs in found.inference.proofs.items():
            for proof in proofs:
                applier.split_group(name, proof)
        split_gathered(applier, found.gathered)
        split_vocabulary(applier, vocabulary)
        split_loss(applier, vocabulary)
        split_stacks(applier, found.stacks)
    split_adapters(applier, adapted, found.context.calls)
    guard_unseen(applier)
    refuse_what_needs_whole_weights(applier)
    avoid_fused_kernels(applier)
    if any(proof.local_results for proofs in found.inference.proofs.values() for proof in proofs):
        applier.hook(model.register_forward_pre_hook(refuse_attention_weights, with_kwargs=True))
    return record


def split_checked(
    model: nn.Module,
    mesh: Mesh,
    found: Analysis,
    whole: Evaluation,
    evaluated: Callable[[SplitRecord], Evaluation],
) -> None:
    """Splits all that was found, or as much of it as leaves the model's values as they were.

    Where all of it does not: all but embedding and head, or only modules of some classes.

    Args:
        whole: what the model gave before.
        evaluated: what the split model gives for the same.

    Raises:
        ValueError: when it does not; the model is as it was.
    """
    attempt = _Attempt(model, mesh, found, whole, evaluated)
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
    found: Analysis
    whole: Evaluation
    evaluated: Callable[[SplitRecord], Evaluation]
    record: SplitRecord | None = None

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
        found = self.found
        if classes is not None:
            found = found.only(classes, f"the model differs when it is split: {problem}")
        self.record = carry_out(self.model, self.mesh.tp, found, layers)
        error, where, raised = math.inf, "", ""
        try:
            try:
                error, where = difference(self.evaluated(self.record), self.whole, self.record)
            except LeftAloneError:
                raise
            except Exception as problem:  # whatever the model's code raises
                where = raised = f"{type(problem).__name__}: {problem}"
            all_arrive(raised, self.mesh.tp)
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
