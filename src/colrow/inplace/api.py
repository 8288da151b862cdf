"""``colrow.parallelize``: any transformer, in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from colrow.inplace.apply import Applier
from colrow.inplace.attention_weights import refuse_attention_weights
from colrow.inplace.capture import capture_calls
from colrow.inplace.check import (
    agreed_error,
    check_equal_weights,
    difference,
    limit_of,
    observe,
)
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
from colrow.inplace.record import Record, record_of
from colrow.inplace.styles import SPLIT
from colrow.inplace.vocabulary import (
    VocabularyLayers,
    knows_loss,
    split_loss,
    split_vocabulary,
    vocabulary_layers,
)
from colrow.mesh import Mesh, ParallelGroup


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    plan: str | Mapping[str, str] = "auto",
    *,
    example_inputs: Mapping[str, Any] | None = None,
    sequence_parallel: bool = False,
    check: bool = True,
) -> nn.Module:
    """Makes a model tensor-parallel in place; returns the same object.

    Every rank starts from the same whole model and keeps its part. Modules and parameters keep
    their names; modules that are split become instances of a class derived from their own. Which
    layers are split, and how their features go to the ranks, is inferred from the model itself:
    nothing is split that was not proven to give the same values and gradients.

    Args:
        model: any transformer; a model of transformers needs nothing else.
        mesh: the grid of ranks.
        plan: "auto" splits all that can be; a dictionary from patterns to styles, as
            :func:`plan_for` gives, splits what it names, and nothing is accepted that cannot be;
            "transformers" takes the plan that comes with the model as such a dictionary.
        example_inputs: keyword arguments for one small forward pass; made up for transformers'
            models.
        sequence_parallel: refused; only the decoder has it.
        check: compare results, loss and gradients of the split model with the whole one's.

    Raises:
        ValueError: when nothing can be split, a plan cannot be followed, the ranks hold different
            weights, or the check finds a difference; the model is then as it was. On all ranks
            alike.
    """
    tp = mesh.tp
    if record_of(model) is not None:
        raise ValueError("this model has been parallelised already")
    if sequence_parallel:
        raise ValueError(
            "sequence_parallel: a model that is split in place keeps its activations whole between "
            "its split layers; colrow's own decoder (colrow.from_pretrained) can divide them"
        )
    if tp.size == 1:
        return model
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device and has no values to split: load its "
            "weights first"
        )
    check_equal_weights(model, tp)
    found = look(model, tp.size, plan, example_inputs)
    vocabulary, batch = found.vocabulary, found.batches[0]
    if not check:
        _apply(model, tp, found, vocabulary)
        return model
    labels = "input_ids" in batch and knows_loss(model, vocabulary)
    whole = observe(model, batch, with_labels=labels)
    failures = []
    for layers in (vocabulary, VocabularyLayers({}, {})):
        record = _apply(model, tp, found, layers)
        error, where = math.inf, ""
        try:
            split = observe(model, batch, with_labels=labels)
            error, where = difference(split, whole, record)
        except Exception as problem:
            where = f"{type(problem).__name__}: {problem}"
        worst = agreed_error(error, tp, next(model.parameters()).device)
        if worst <= limit_of(model):
            return model
        failures.append(f"{where} is off by {worst:.1e}" if error < math.inf else where)
        record.restore()
        model.__dict__.pop("colrow_record", None)
    raise ValueError(
        f"{type(model).__name__} was split, but does not give what the whole model gives "
        f"({'; without embedding and head: '.join(failures)}); it is whole again"
    )


def plan_for(
    model: nn.Module, tp: int | None = None, *, example_inputs: Mapping[str, Any] | None = None
) -> Plan:
    """What :func:`parallelize` would do with a model on ``tp`` ranks (2 by default); sends nothing.

    Returns:
        A dictionary of patterns and styles, which may be edited and given to ``parallelize``. Its
        ``rows`` say for everything in the model what happens to it and why.

    Raises:
        ValueError: when nothing can be split.
    """
    return look(model, tp or 2, "auto", example_inputs).plan


@dataclass
class Look:
    """What was found in a model."""

    batches: list[Mapping[str, Any]]
    inference: Inference
    vocabulary: VocabularyLayers
    gathered: GatheredLayers
    plan: Plan


def look(
    model: nn.Module,
    ranks: int,
    plan: str | Mapping[str, str],
    example_inputs: Mapping[str, Any] | None,
) -> Look:
    """Finds what can be split over ``ranks`` ranks; arguments as for :func:`parallelize`."""
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
        [*example_batches(model)] if example_inputs is None else [example_inputs]
    )
    calls = capture_calls(model, batches)
    vocabulary = vocabulary_layers(model, set(calls), ranks)
    reserved = vocabulary.names
    if matcher is not None:
        vocabulary = vocabulary.only(allowed)
    inference = infer(model, calls, ranks, reserved, None if matcher is None else allowed)
    gathered = gathered_layers(model, calls, inference, reserved, ranks)
    if matcher is not None:
        gathered = gathered.only(allowed)
    if not inference.proofs and not gathered.linears:
        raise ValueError(_nothing(model, inference))
    planned = make_plan(model, inference, vocabulary, gathered, ranks)
    if matcher is not None:
        check_followed(matcher, planned, model, inference)
    return Look(batches, inference, vocabulary, gathered, planned)


def _nothing(model: nn.Module, inference: Inference) -> str:
    reasons: dict[str, str] = {}
    for layer, reason in inference.reasons.items():
        reasons.setdefault(reason, layer)
    text = "; ".join(f"{layer}: {reason}" for reason, layer in list(reasons.items())[:4])
    return f"no layer of {type(model).__name__} can be split: {text or 'no pair of layers found'}"


def _apply(
    model: nn.Module, tp: ParallelGroup, found: Look, vocabulary: VocabularyLayers
) -> Record:
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
