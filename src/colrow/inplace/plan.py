"""Which layers are split, how and why: as a dictionary that a user can read, edit and save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from colrow.inplace.find.infer import Inference
from colrow.inplace.find.proof import Proof
from colrow.inplace.find.shard_groups import spec_of_rows
from colrow.inplace.find.styles import (
    COLUMN,
    EXPERTS,
    ROW,
    SPLIT,
    TABLE,
    Matcher,
    check_styles,
    pattern_of,
)
from colrow.inplace.find.whole_results import GatheredLayers, VocabularyLayers
from colrow.inplace.observe.calls import full_name
from colrow.inplace.observe.linear_layers import linear_kind, output_dim


@dataclass(frozen=True)
class PlanRow:
    """One kind of layer.

    Attributes:
        module: its name, with ``*`` for the layer's number.
        style: see :mod:`colrow.inplace.find.styles`.
        why: where the choice comes from, or why it is not split.
        parameters: elements of all layers of this kind.
        share: the part of them that a rank holds, on average.
    """

    module: str
    style: str
    why: str
    parameters: int
    share: float


class Plan(dict[str, str]):
    """Pattern to style, as a plain dictionary, with a row of explanation for everything."""

    def __init__(self, styles: Mapping[str, str], rows: list[PlanRow]) -> None:
        super().__init__(styles)
        self.rows = rows

    @property
    def share(self) -> float:
        """The part of the model's parameters that a rank holds, on average."""
        total = sum(row.parameters for row in self.rows)
        return sum(row.parameters * row.share for row in self.rows) / total if total else 1.0


def transformers_plan(model: nn.Module) -> dict[str, str]:
    """The tensor-parallel plan that comes with a model of transformers; empty for any other."""
    plan: Any = getattr(model, "_tp_plan", None) or {}
    return dict(plan)


def make_plan(
    model: nn.Module,
    inference: Inference,
    vocabulary: VocabularyLayers,
    gathered: GatheredLayers,
    ranks: int,
) -> Plan:
    """What was found as a plan; its rows say where transformers' own plan says the same or not."""
    entries = _entries(model, inference, vocabulary, ranks)
    for name in gathered.linears:
        reason = inference.reasons.get(name, "not in a pair of layers that can be split")
        entries[name] = "colwise_gather_output", 1 / ranks, f"gathered: {reason}"
    for name in gathered.tables:
        entries[name] = "embedding_rowwise", 1 / ranks, "a large table"
    for name in gathered.parameters:
        owner = name.rpartition(".")[0]
        known = inference.reasons.get(name) or inference.reasons.get(owner)
        if known is None:
            known = entries[name][2] if name in entries else "in no pair that can be split"
        entries[name] = "gathered_parameter", 1 / ranks, f"gathered where it is used: {known}"
    theirs = Matcher(transformers_plan(model))
    styles: dict[str, str] = {}
    rows: dict[tuple[str, str, str], tuple[int, float]] = {}
    counted: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in counted:
            continue
        counted.add(id(parameter))
        owner, _, last = name.rpartition(".")
        key = name if name in entries else owner
        style, share, why = entries.get(key, ("replicate", 1.0, ""))
        share = entries[name][1] if name in entries else share
        if style in ROW and last == "bias":
            share = 1.0
        other = theirs.style(key)
        if style in SPLIT:
            agreed = _agree(style, other)
            why = "transformers' plan, proven" if agreed else (why or "inferred, proven")
        elif not why:
            why = (
                inference.reasons.get(owner)
                or inference.reasons.get(name)
                or (
                    "not in a pair of layers that can be split"
                    if parameter.dim() > 1
                    else "a vector that every rank needs whole"
                )
            )
            if other in SPLIT:
                why = f"transformers' plan says {other}, but: {why}"
        pattern = pattern_of(key)
        if style != "replicate":
            styles[pattern] = style
        count, held = rows.get((pattern, style, why), (0, 0.0))
        elements = parameter.numel()
        rows[pattern, style, why] = count + elements, held + elements * share
    listed = [
        PlanRow(module, style, why, count, held / count if count else 1.0)
        for (module, style, why), (count, held) in rows.items()
    ]
    return Plan(styles, listed)


def _agree(style: str, other: str | None) -> bool:
    if style in EXPERTS and other in COLUMN | ROW:
        return True  # transformers' plans name the tensors of experts one by one
    return any(style in same and other in same for same in (COLUMN, ROW, TABLE, EXPERTS))


def _entries(
    model: nn.Module, inference: Inference, vocabulary: VocabularyLayers, ranks: int
) -> dict[str, tuple[str, float, str]]:
    """By module or parameter: style, a rank's average share, and a reason that is known here."""
    entries: dict[str, tuple[str, float, str]] = {}
    known: dict[int, dict[str, tuple[str, float, str]]] = {}  # blocks of one kind share proofs
    for name, proofs in inference.proofs.items():
        module = model.get_submodule(name)
        for proof in proofs:
            if id(proof) not in known:
                known[id(proof)] = _of_proof(module, proof, ranks)
            for inner, entry in known[id(proof)].items():
                entries[full_name(name, inner)] = entry
    for name in vocabulary.embeddings:
        entries[name] = "embedding_rowwise", 1 / ranks, "the vocabulary"
    for name in vocabulary.heads:
        entries[name] = "colwise_gather_output", 1 / ranks, "the vocabulary"
    return entries


def _of_proof(module: nn.Module, proof: Proof, ranks: int) -> dict[str, tuple[str, float, str]]:
    found: dict[str, tuple[str, float, str]] = {}
    group = proof.group
    for layer, rows in group.columns.items():
        target = module.get_submodule(layer)
        kind = linear_kind(target)
        assert kind is not None
        weight: Any = target.weight
        shape = tuple(weight.shape)
        share = sum(map(len, rows)) / ranks / shape[output_dim(kind)]
        packed = len(spec_of_rows(shape, output_dim(kind), rows).blocks) > 1
        style = "packed_colwise" if packed else "colwise"
        found[layer] = ("embedding_colwise" if kind == "embedding" else style), share, ""
    for layer in group.rows:
        found[layer] = "rowwise", 1 / ranks, ""
    for name, (dim, rows) in group.parameters.items():
        length = module.get_parameter(name).shape[dim]
        share = sum(map(len, rows)) / ranks / length
        found[name] = ("moe_tp_experts" if proof.summed else "split_parameter"), share, ""
    for name in proof.shared:
        found[name] = "replicated_with_grad_allreduce", 1.0, "used by every rank's own heads"
    for layer in proof.cuts.outputs:
        found[layer] = "copy_output", 1.0, "whole, and used by every rank's own heads"
    return found


def check_plan(model: nn.Module, plan: Mapping[str, str]) -> Matcher:
    """The plan as a matcher of names.

    Raises:
        ValueError: for an unknown style, or a pattern that matches nothing in the model.
    """
    check_styles(plan)
    matcher = Matcher(plan)
    names = [n for n, _ in model.named_modules() if n]
    names += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if missing := matcher.unmatched(names):
        raise ValueError(
            f"the plan's pattern {missing[0]!r} matches no module or parameter of "
            f"{type(model).__name__}"
        )
    return matcher


def check_followed(matcher: Matcher, found: Plan, model: nn.Module, inference: Inference) -> None:
    """Raises ValueError where the plan that was asked for and the one that was found differ."""
    mine = Matcher(found)
    for name, module in model.named_modules():
        wanted = matcher.style(name)
        if wanted is None or wanted not in SPLIT or not list(module.parameters(recurse=False)):
            continue
        got = mine.style(name)
        if got is None and any(
            mine.style(f"{name}.{p}") in SPLIT for p, _ in module.named_parameters(recurse=False)
        ):
            continue
        if got is None or not _agree(wanted, got):
            reason = inference.reasons.get(name, "it is not in a pair of layers that can be split")
            raise ValueError(
                f"the plan says {wanted!r} for {name}, but "
                + (f"it can only be {got!r}" if got else reason)
            )
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner, asked = name.rpartition(".")[0], matcher.style(name)
        done = {mine.style(name), mine.style(owner)}
        if asked in SPLIT and not done & SPLIT:
            known = inference.reasons.get(name) or inference.reasons.get(owner)
            raise ValueError(
                f"the plan says {asked!r} for {name}, but "
                + (known or "it is not in a pair of layers that can be split")
            )
