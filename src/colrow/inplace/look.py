"""What can be split in a model, found; and the split carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from colrow.inplace.apply import Applier
from colrow.inplace.attention_weights import refuse_attention_weights
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
from colrow.inplace.sequence import Stack, find_stacks
from colrow.inplace.sequence_modules import split_stacks
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
    """What was found in a model."""

    batches: list[Mapping[str, Any]]
    inference: Inference
    vocabulary: VocabularyLayers
    gathered: GatheredLayers
    plan: Plan
    stacks: list[Stack]


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
        [*example_batches(runnable)] if example_inputs is None else [example_inputs]
    )
    with running():
        calls = capture_calls(runnable, batches)
    vocabulary = vocabulary_layers(model, set(calls), ranks)
    reserved = vocabulary.names
    if matcher is not None:
        vocabulary = vocabulary.only(allowed)
    inference = infer(runnable, calls, ranks, reserved, None if matcher is None else allowed)
    gathered = gathered_layers(model, calls, inference, reserved, ranks)
    if matcher is not None:
        gathered = gathered.only(allowed)
    if not inference.proofs and not gathered.linears:
        raise ValueError(_nothing(model, inference))
    planned = make_plan(model, inference, vocabulary, gathered, ranks)
    if matcher is not None:
        check_followed(matcher, planned, model, inference)
    stacks = []
    if sequence_parallel:
        with running():
            stacks = find_stacks(runnable, batches[0], calls, inference, gathered, ranks)
    return Look(batches, inference, vocabulary, gathered, planned, stacks)


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
    split_stacks(applier, found.stacks)
    if any(proof.local_results for proofs in found.inference.proofs.values() for proof in proofs):
        applier.hook(model.register_forward_pre_hook(refuse_attention_weights, with_kwargs=True))
    return record
