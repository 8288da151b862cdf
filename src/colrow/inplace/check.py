"""The split model against the whole one: results, loss and gradients of one small batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.agreement import all_arrive
from colrow.inplace.apply.record import SplitRecord, record_of
from colrow.inplace.find.shard_groups import indices_of
from colrow.inplace.observe.calls import tensors_of
from colrow.inplace.observe.modes import NoDropout, arithmetic_of, evaluating, without_cache
from colrow.verification.comparison import (
    SMALL_GRADIENT,
    largest_norm,
    relative_error,
    worst_of,
)
from colrow.verification.reference import quiet_transformers

_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3}
_LOW_PRECISION_LIMIT = 0.2
_MOST_ELEMENTS = 1 << 28
_STEPS = 3
_STARTS = ("input_ids", "pixel_values", "input_features")


@dataclass
class GenerationSteps:
    """The first steps of ``model.generate``, where a model with a cache takes other ways.

    Attributes:
        logits: of each step; empty where the model does not generate.
        problem: what it raised instead.
    """

    logits: list[Tensor] = field(default_factory=list)
    problem: str = ""


def generated(model: Any, inputs: Mapping[str, Any]) -> GenerationSteps:
    """Logits of the first steps of ``model.generate``, with tokens that do not depend on them.

    Args:
        inputs: of a forward pass; generation starts from its tokens, images or sound.
    """
    if not callable(getattr(model, "generate", None)) or not _can_generate(model):
        return GenerationSteps()
    start = {name: inputs[name] for name in _STARTS if isinstance(inputs.get(name), Tensor)}
    if not start:
        return GenerationSteps()
    try:
        with quiet_transformers():
            result: Any = model.generate(
                **start,
                max_new_tokens=_STEPS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                logits_processor=[_forced],
            )
    except Exception as error:  # whatever the model's code raises
        return GenerationSteps(problem=f"{type(error).__name__}: {error}")
    return GenerationSteps([step.detach().clone() for step in result.logits or ()])


def _can_generate(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else False


def _forced(ids: Tensor, scores: Tensor) -> Tensor:
    """Scores by which the next token follows from how many there are, whatever the logits."""
    chosen = torch.full_like(scores, -1.0)
    chosen[:, 3 + 7 * ids.shape[-1] % max(1, scores.shape[-1] - 8)] = 1.0
    return chosen


@dataclass(frozen=True)
class Evaluation:
    """What a model gave for a batch.

    Attributes:
        results: its floating-point results, without gradients being recorded.
        loss: its own loss, or a random combination of its results.
        grads: of that loss, by parameter; empty for models too large to keep them.
        steps: of generation.
        drops: whether dropout had to be left out of the loss.
    """

    results: list[Tensor]
    loss: Tensor | None
    grads: dict[str, Tensor]
    steps: GenerationSteps
    drops: bool = False


def evaluate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    with_labels: bool,
    of: Collection[str] | None = None,
    results: list[Tensor] | None = None,
    drops: bool = True,
) -> Evaluation:
    """What the model gives for a batch in eval mode; its parameters' ``grad`` stays as it was.

    Args:
        of: the parameters whose gradients to take; all by default.
        results: what the model gives in eval mode without a cache, where that is known.
        drops: False where it is known that the model's loss takes no dropout in eval mode.

    Raises:
        LeftAloneError: as :func:`all_arrive`, for a model that is split.
    """
    with evaluating(model), arithmetic_of(model):
        with torch.no_grad():
            steps = generated(model, inputs)
        if (record := record_of(model)) is not None:
            all_arrive(steps.problem, record.tp)
        with without_cache(model):
            if results is None:
                with torch.no_grad():
                    results = [y.detach().clone() for y in tensors_of(model(**inputs))]
            named = {
                n: p
                for n, p in model.named_parameters()
                if p.requires_grad and (of is None or n in of)
            }
            seen = Evaluation(results, None, {}, steps)
            size = sum(p.numel() for p in named.values())
            if not named or size > _MOST_ELEMENTS or next(model.parameters()).element_size() < 4:
                return seen
            mode = NoDropout() if drops else None
            try:
                loss, grads = _gradients(model, inputs, named, mode, with_labels=with_labels)
            except AssertionError:  # Reformer's backward runs its layers again, only in training
                model.train()
                mode = NoDropout()
                loss, grads = _gradients(model, inputs, named, mode, with_labels=with_labels)
            return replace(seen, loss=loss, grads=grads, drops=mode is not None and mode.met)


def _gradients(
    model: nn.Module,
    inputs: Mapping[str, Any],
    named: dict[str, nn.Parameter],
    mode: NoDropout | None,
    *,
    with_labels: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    parameters = list(model.parameters())
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.enable_grad(), mode or nullcontext(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = _loss(model, inputs, with_labels=with_labels)
            if loss is None:
                return None, {}
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        # Reversible layers leave the gradients of their own parameters there.
        aside = [parameter.grad for parameter in named.values()]
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    found = {}
    for name, mine, other in zip(named, grads, aside, strict=True):
        both = [g for g in (mine, other) if g is not None]
        if both:
            found[name] = both[0] if len(both) == 1 else both[0] + both[1]
    return loss.detach(), found


def _loss(model: nn.Module, inputs: Mapping[str, Any], *, with_labels: bool) -> Tensor | None:
    if with_labels:
        loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
        return loss
    generator = torch.Generator().manual_seed(11)
    total: Tensor | None = None
    for y in tensors_of(model(**inputs)):
        if y.requires_grad:
            weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            term = (y * weight.to(y)).sum()
            total = term if total is None else total + term
    return total


def difference(split: Evaluation, whole: Evaluation, record: SplitRecord) -> tuple[float, str]:
    """The largest relative error of this rank, and of what.

    Args:
        record: how the model is split, which says what of a whole gradient the rank should have.
    """
    if len(split.results) != len(whole.results):
        return math.inf, "the number of results"
    errors = {
        f"result {number}": relative_error(y, expected, masked=True)
        for number, (y, expected) in enumerate(zip(split.results, whole.results, strict=True))
    }
    if whole.steps.logits:
        if len(split.steps.logits) != len(whole.steps.logits):
            return math.inf, f"generation with a cache: {split.steps.problem}"
        for y, expected in zip(split.steps.logits, whole.steps.logits, strict=True):
            error, what = relative_error(y, expected, masked=True), "generation with a cache"
            errors[what] = max(error, errors.get(what, 0.0))
    if split.loss is not None and whole.loss is not None:
        errors["the loss"] = relative_error(split.loss, whole.loss, masked=True)
    small = SMALL_GRADIENT * largest_norm(whole.grads.values())
    for name, grad in whole.grads.items():
        spec = record.specs.get(name)
        if spec is not None and spec.dim is not None:
            held = indices_of(spec, record.tp.rank)
            index = torch.tensor(held, dtype=torch.long, device=grad.device)
            grad = grad.index_select(spec.dim, index)
        mine = split.grads.get(name, torch.zeros_like(grad))
        error = relative_error(mine, grad, smallest=small, masked=True)
        errors[f"the gradient of {name}"] = error
    return worst_of(errors)


def limit_of(model: nn.Module) -> float:
    """How large an error rounding may cause in a model of this dtype."""
    dtype = next(model.parameters()).dtype
    return _LIMITS.get(dtype, _LOW_PRECISION_LIMIT)


def agreed_error(error: float, tp: ParallelGroup, device: torch.device) -> float:
    """The largest error of any rank. Communicates: one all-reduce of a number."""
    value = torch.tensor([min(error, 1e30)], dtype=torch.float64, device=device)
    return float(primitives.all_reduce(value, tp, op="max", layer="check"))
