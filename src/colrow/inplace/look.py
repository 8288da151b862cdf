"""What can be split in a model, found; and the split carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from colrow.comm.group import ParallelGroup
from colrow.inplace.adapters import adapted_layers, split_adapters, without_adapters
from colrow.inplace.apply import Applier
from colrow.inplace.attention_weights import refuse_attention_weights
from colrow.inplace.between import keep_what_is_used_elsewhere, local_loss_is_right
from colrow.inplace.calls import ModuleCall
from colrow.inplace.capture import capture_calls
from colrow.inplace.examples import example_batches
from colrow.inplace.fused import avoid_fused_kernels
from colrow.inplace.gathered import GatheredLayers, gathered_layers, split_gathered
from colrow.inplace.infer import Inference, infer
from colrow.inplace.plan import (
    Plan,
    check_followed,
    check_plan,
    make_plan,
    transformers_plan,
)
from colrow.inplace.record import Record
from colrow.inplace.sequence import Stack, find_stacks
from colrow.inplace.sequence_modules import split_stacks
from colrow.inplace.styles import SPLIT
from colrow.inplace.unseen import guard_unseen
from colrow.inplace.vocabulary import (
    VocabularyLayers,
    split_loss,
    split_vocabulary,
    vocabulary_layers,
)
from colrow.inplace.whole_only import refuse_what_needs_whole_weights


@dataclass(frozen=True)
class _Context:
    """What a model was looked at with.

    Attributes:
        runnable: what is run in place of ``model`` where that has no values, inside ``running``.
        results: of the model for the first batch; None where it was run without its adapters.
        reserved: layers that have one row for each token.
        allowed: whether a layer may be split; None where all may.
    """

    model: nn.Module
    runnable: nn.Module
    running: Callable[[], AbstractContextManager[None]]
    batches: list[Mapping[str, Any]]
    calls: Mapping[str, ModuleCall]
    results: list[Tensor] | None
    vocabulary: VocabularyLayers
    reserved: set[str]
    ranks: int
    allowed: Callable[[str], bool] | None
    sequence_parallel: bool

    def complete(self, inference: Inference) -> Look:
        """Everything else that follows from this inference."""
        with without_adapters(self.model, self.runnable):
            return self._complete(inference)

    def _complete(self, inference: Inference) -> Look:
        model, ranks = self.model, self.ranks
        gathered = gathered_layers(model, self.calls, inference, self.reserved, ranks)
        if self.allowed is not None:
            gathered = gathered.only(self.allowed)
        if self.sequence_parallel:
            # Between divided tokens a parameter's gradient would be a part on every rank.
            gathered.parameters.clear()
        plan = make_plan(model, inference, self.vocabulary, gathered, ranks)
        stacks: list[Stack] = []
        if self.sequence_parallel:
            batch = self.batches[0]
            with self.running():
                stacks = find_stacks(self.runnable, batch, self.calls, inference, gathered, ranks)
        return Look(self, inference, gathered, plan, stacks)


@dataclass
class Look:
    """What was found in a model."""

    context: _Context
    inference: Inference
    gathered: GatheredLayers
    plan: Plan
    stacks: list[Stack]

    @property
    def batches(self) -> list[Mapping[str, Any]]:
        """Keyword arguments of the forward passes that were looked at."""
        return self.context.batches

    @property
    def results(self) -> list[Tensor] | None:
        """The whole model's floating-point results for the first of them, where they are known."""
        return self.context.results

    @property
    def vocabulary(self) -> VocabularyLayers:
        """Layers that may be divided over the vocabulary."""
        return self.context.vocabulary

    def run_with_adapters(self) -> Look:
        """The same for a model whose results are others than those without its adapters."""
        return replace(self, context=replace(self.context, results=None))

    def only(self, classes: Collection[str], reason: str) -> Look:
        """The same with pairs inside modules of these classes only; other layers get the reason."""
        proofs = self.inference.proofs
        names = {n for n in proofs if class_name(self.context.model, n) in classes}
        return self.context.complete(self.inference.only(names, reason))


def class_name(model: nn.Module, name: str) -> str:
    """Of which class a module of the model is."""
    return type(model.get_submodule(name)).__name__


def look(
    model: nn.Module,
    ranks: int,
    plan: str | Mapping[str, str],
    example_inputs: Mapping[str, Any] | None,
    runnable: nn.Module | None = None,
    *,
    running: Callable[[], AbstractContextManager[None]] = nullcontext,
    sequence_parallel: bool = False,
) -> Look:
    """Finds what can be split over ``ranks`` ranks.

    Args:
        runnable: what is run in place of a model without values, inside ``running``.
        sequence_parallel: whether to look for blocks whose tokens can be divided.

    Raises:
        ValueError: as :func:`colrow.parallelize`.
    """
    runnable = model if runnable is None else runnable
    with without_adapters(model, runnable) as adapted:
        if adapted and sequence_parallel:
            raise ValueError(
                "sequence_parallel=True does not go with LoRA adapters: merge them first, or leave "
                "it out"
            )
        found = _look(model, ranks, plan, example_inputs, runnable, running, sequence_parallel)
    return found.run_with_adapters() if adapted else found


def _look(
    model: nn.Module,
    ranks: int,
    plan: str | Mapping[str, str],
    example_inputs: Mapping[str, Any] | None,
    runnable: nn.Module,
    running: Callable[[], AbstractContextManager[None]],
    sequence_parallel: bool,
) -> Look:
    if plan == "transformers":
        plan = transformers_plan(model)
        if not plan:
            raise ValueError(f"transformers has no plan for {type(model).__name__}; use 'auto'")
    if plan != "auto" and not isinstance(plan, Mapping):
        raise ValueError(f"plan={plan!r}: give 'auto', 'transformers' or a dictionary")
    matcher = None if isinstance(plan, str) else check_plan(model, plan)

    def allowed(name: str) -> bool:
        assert matcher is not None
        names = [name]
        if name:
            owned = model.get_submodule(name).named_parameters(recurse=False)
            names += [f"{name}.{p}" for p, _ in owned]
        return any(matcher.style(n) in SPLIT for n in names)

    batches: list[Mapping[str, Any]] = (
        [*example_batches(runnable)] if example_inputs is None else [example_inputs]
    )
    with running():
        calls, results = capture_calls(runnable, batches)
    vocabulary = vocabulary_layers(model, set(calls), ranks)
    reserved = vocabulary.names
    if matcher is not None:
        vocabulary = vocabulary.only(allowed)
    may = None if matcher is None else allowed
    inference = infer(runnable, calls, ranks, reserved, may)
    with running():
        inference = keep_what_is_used_elsewhere(runnable, batches[0], inference, vocabulary)
        if not local_loss_is_right(runnable, batches[0], vocabulary):
            vocabulary = replace(vocabulary, local_loss=False)
    context = _Context(
        model,
        runnable,
        running,
        batches,
        calls,
        results,
        vocabulary,
        reserved,
        ranks,
        may,
        sequence_parallel,
    )
    found = context.complete(inference)
    if not inference.proofs and not found.gathered.linears and not found.gathered.parameters:
        raise ValueError(_nothing(model, inference))
    if matcher is not None:
        check_followed(matcher, found.plan, model, inference)
    return found


def _nothing(model: nn.Module, inference: Inference) -> str:
    reasons: dict[str, str] = {}
    for layer, reason in inference.reasons.items():
        reasons.setdefault(reason, layer)
    text = "; ".join(f"{layer}: {reason}" for reason, layer in list(reasons.items())[:4])
    return f"no layer of {type(model).__name__} can be split: {text or 'no pair of layers found'}"


def carry_out(
    model: nn.Module, tp: ParallelGroup, found: Look, vocabulary: VocabularyLayers
) -> Record:
    """Splits the model as found, with these layers divided over the vocabulary."""
    record = Record(tp)
    model.__dict__["colrow_record"] = record
    applier = Applier(model, record)
    adapted = adapted_layers(model)
    with without_adapters(model):
        for name, proofs in found.inference.proofs.items():
            for proof in proofs:
                applier.proof(name, proof)
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
