"""What can be split in a model, found; and the split carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from colrow.inplace.apply import Applier
from colrow.inplace.attention_weights import refuse_attention_weights
from colrow.inplace.calls import ModuleCall
from colrow.inplace.capture import capture_calls
from colrow.inplace.examples import example_batches
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
from colrow.inplace.styles import SPLIT
from colrow.inplace.vocabulary import (
    VocabularyLayers,
    split_loss,
    split_vocabulary,
    vocabulary_layers,
)
from colrow.mesh import ParallelGroup


@dataclass
class Look:
    """What was found in a model.

    Attributes:
        only: the same with proofs only inside modules of these classes, and a reason for the rest.
    """

    batches: list[Mapping[str, Any]]
    inference: Inference
    vocabulary: VocabularyLayers
    gathered: GatheredLayers
    plan: Plan
    only: Callable[[Collection[str], str], Look]


def look(
    model: nn.Module,
    ranks: int,
    plan: str | Mapping[str, str],
    example_inputs: Mapping[str, Any] | None,
    runnable: nn.Module | None = None,
) -> Look:
    """Finds what can be split over ``ranks`` ranks.

    Args:
        runnable: what is run in place of a model without values.

    Raises:
        ValueError: as :func:`colrow.parallelize`.
    """
    running = model if runnable is None else runnable
    if plan == "transformers":
        plan = transformers_plan(model)
        if not plan:
            raise ValueError(f"transformers has no plan for {type(model).__name__}; use 'auto'")
    if isinstance(plan, str) and plan != "auto":
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
        [*example_batches(running)] if example_inputs is None else [example_inputs]
    )
    calls = capture_calls(running, batches)
    vocabulary = vocabulary_layers(model, set(calls), ranks)
    reserved = vocabulary.names
    if matcher is not None:
        vocabulary = vocabulary.only(allowed)
    may = None if matcher is None else allowed
    inference = infer(running, calls, ranks, reserved, may)
    found = _rest(model, batches, calls, vocabulary, ranks, inference, reserved, may)
    if not inference.proofs and not found.gathered.linears:
        raise ValueError(_nothing(model, inference))
    if matcher is not None:
        check_followed(matcher, found.plan, model, inference)
    return found


def _rest(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    calls: Mapping[str, ModuleCall],
    vocabulary: VocabularyLayers,
    ranks: int,
    inference: Inference,
    reserved: set[str],
    allowed: Callable[[str], bool] | None,
) -> Look:
    gathered = gathered_layers(model, calls, inference, reserved, ranks)
    if allowed is not None:
        gathered = gathered.only(allowed)

    def only(classes: Collection[str], reason: str) -> Look:
        names = {n for n in inference.proofs if class_name(model, n) in classes}
        narrowed = inference.only(names, reason)
        return _rest(model, batches, calls, vocabulary, ranks, narrowed, reserved, allowed)

    plan = make_plan(model, inference, vocabulary, gathered, ranks)
    return Look(batches, inference, vocabulary, gathered, plan, only)


def class_name(model: nn.Module, name: str) -> str:
    """Of which class a module of the model is."""
    return type(model.get_submodule(name)).__name__


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
    for name, proofs in found.inference.proofs.items():
        for proof in proofs:
            applier.proof(name, proof)
    split_gathered(applier, found.gathered)
    split_vocabulary(applier, vocabulary)
    split_loss(applier, vocabulary)
    if any(proof.local_results for proofs in found.inference.proofs.values() for proof in proofs):
        applier.hook(model.register_forward_pre_hook(refuse_attention_weights, with_kwargs=True))
    return record
