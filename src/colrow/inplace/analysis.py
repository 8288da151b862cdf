"""What can be split in a model, and what follows from that: everything ``parallelize`` decides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.inplace.find.infer import Inference, infer
from colrow.inplace.find.model_code import keep_what_is_used_elsewhere, local_loss_is_right
from colrow.inplace.find.sequence import Stack, find_stacks
from colrow.inplace.find.styles import SPLIT
from colrow.inplace.find.whole_results import (
    GatheredLayers,
    VocabularyLayers,
    gathered_layers,
    knows_loss,
    vocabulary_layers,
)
from colrow.inplace.observe.calls import ModuleCall, as_double, capture_calls
from colrow.inplace.observe.example_inputs import example_batches
from colrow.inplace.observe.linear_layers import without_adapters
from colrow.inplace.plan import Plan, check_followed, check_plan, make_plan, transformers_plan
from colrow.inplace.weights.stand_in import StandIn


@dataclass(frozen=True)
class _Context:
    """What a model was analysed with.

    Attributes:
        stand_in: what is run in place of a model on the meta device; None for one with values.
        results: of the model for the first batch; None where it was run without its adapters.
        vocabulary: layers that have one row for each token, and may be split.
        reserved: all layers that have one row for each token.
        allowed: whether a layer may be split; None where all may.
    """

    model: nn.Module
    stand_in: StandIn | None
    batches: list[Mapping[str, Any]]
    calls: Mapping[str, ModuleCall]
    results: list[Tensor] | None
    vocabulary: VocabularyLayers
    reserved: set[str]
    ranks: int
    allowed: Callable[[str], bool] | None
    sequence_parallel: bool

    def complete(self, inference: Inference) -> Analysis:
        """Everything else that follows from this inference."""
        with without_adapters(self.model, _runnable(self.model, self.stand_in)):
            return self._complete(inference)

    def _complete(self, inference: Inference) -> Analysis:
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
            runnable = _runnable(model, self.stand_in)
            with _running(self.stand_in):
                stacks = find_stacks(
                    runnable, self.batches[0], self.calls, inference, gathered, ranks
                )
        return Analysis(self, inference, gathered, plan, stacks)


@dataclass
class Analysis:
    """What can be split in a model over a number of ranks.

    Attributes:
        context: what the model was analysed with.
        inference: pairs of column- and row-parallel layers, and experts, each with its proof.
        gathered: other large layers and parameters, divided and gathered when they are used.
        plan: all of this as a dictionary for users.
        stacks: blocks whose tokens are divided, with ``sequence_parallel``.
    """

    context: _Context
    inference: Inference
    gathered: GatheredLayers
    plan: Plan
    stacks: list[Stack]

    @property
    def batch(self) -> Mapping[str, Any]:
        """Keyword arguments of the forward pass in which the model is compared."""
        return self.context.batches[0]

    @property
    def results(self) -> list[Tensor] | None:
        """The whole model's floating-point results for that batch, where they are known."""
        return self.context.results

    @property
    def vocabulary(self) -> VocabularyLayers:
        """Layers that may be divided over the vocabulary."""
        return self.context.vocabulary

    @property
    def has_loss(self) -> bool:
        """Whether the model gives a loss of its own for that batch."""
        return knows_loss(self.context.model, self.vocabulary, self.batch)

    def only(self, classes: Collection[str], reason: str) -> Analysis:
        """The same with pairs inside modules of these classes only; other layers get the reason."""
        proofs = self.inference.proofs
        names = {n for n in proofs if class_name(self.context.model, n) in classes}
        return self.context.complete(self.inference.only(names, reason))

    def described(self) -> list[object]:
        """Plain values that are equal on ranks that found the same."""
        proofs = {id(p): p for of_module in self.inference.proofs.values() for p in of_module}
        places = [(name, len(of_module)) for name, of_module in self.inference.proofs.items()]
        groups = [(p.group, sorted(p.shared), sorted(p.cuts.outputs)) for p in proofs.values()]
        return [sorted(self.plan.items()), places, groups]


def class_name(model: nn.Module, name: str) -> str:
    """Of which class a module of the model is."""
    return type(model.get_submodule(name)).__name__


def _runnable(model: nn.Module, stand_in: StandIn | None) -> nn.Module:
    return model if stand_in is None else stand_in.model


def _running(stand_in: StandIn | None) -> AbstractContextManager[None]:
    """What forward passes of the runnable model happen in."""
    return nullcontext() if stand_in is None else stand_in.running()


def analyse(
    model: nn.Module,
    ranks: int,
    plan: str | Mapping[str, str],
    example_inputs: Mapping[str, Any] | None,
    *,
    stand_in: StandIn | None = None,
    sequence_parallel: bool = False,
) -> Analysis:
    """Finds and proves what can be split over ``ranks`` ranks; changes nothing, sends nothing.

    Args:
        plan: which layers may be split, as for :func:`colrow.parallelize`.
        stand_in: what is run in place of a model on the meta device.
        sequence_parallel: whether to find blocks whose tokens can be divided.

    Raises:
        ValueError: as :func:`colrow.parallelize`.
    """
    with without_adapters(model, _runnable(model, stand_in)) as adapted:
        if adapted and sequence_parallel:
            raise ValueError(
                "sequence_parallel=True does not go with LoRA adapters: merge them first, or leave "
                "it out"
            )
        found = _analyse(model, ranks, plan, example_inputs, stand_in, sequence_parallel)
    if adapted:  # with its adapters, the model's results are others
        found.context = replace(found.context, results=None)
    return found


def _analyse(
    model: nn.Module,
    ranks: int,
    plan: str | Mapping[str, str],
    example_inputs: Mapping[str, Any] | None,
    stand_in: StandIn | None,
    sequence_parallel: bool,
) -> Analysis:
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

    runnable = _runnable(model, stand_in)
    if example_inputs is not None and stand_in is not None:
        example_inputs = pytree.tree_map(as_double, dict(example_inputs))
    batches: list[Mapping[str, Any]] = (
        [*example_batches(runnable)] if example_inputs is None else [example_inputs]
    )
    with _running(stand_in):
        calls, results = capture_calls(runnable, batches)
    vocabulary = vocabulary_layers(model, set(calls), ranks)
    reserved = vocabulary.names
    may = None if matcher is None else allowed
    if may is not None:
        vocabulary = vocabulary.only(may)
    inference = infer(runnable, calls, ranks, reserved, may)
    with _running(stand_in):
        inference = keep_what_is_used_elsewhere(runnable, batches[0], inference, vocabulary)
        if not local_loss_is_right(runnable, batches[0], vocabulary):
            vocabulary = replace(vocabulary, local_loss=False)
    context = _Context(
        model,
        stand_in,
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
