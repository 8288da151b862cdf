"""Finds and proves what can be split in every module of a model, the innermost modules first.

Modules of one kind are analysed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.find.experts import find_experts, used_directly
from colrow.inplace.find.layer_groups import LayerGroup, find_groups
from colrow.inplace.find.pair_proof import prove_group
from colrow.inplace.find.proof import NotProvenError, Proof
from colrow.inplace.observe.calls import ModuleCall, full_name, kind_of
from colrow.inplace.observe.linear_layers import linear_kind
from colrow.inplace.observe.reach import Reach, probe
from colrow.inplace.observe.unit import Unit, UnitError

# Wide layers are probed coarsely first, and more finely where heads do not fit into that.
_FEW_UNITS, _MANY_UNITS = 128, 1024


@dataclass
class Inference:
    """Which layers can be split in pairs, or as experts.

    Attributes:
        proofs: by module, of the groups of layers inside it.
        reasons: by layer, why it is not split.
    """

    proofs: dict[str, list[Proof]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def only(self, names: Collection[str], reason: str) -> Inference:
        """The same with the proofs of these modules only; the others' layers get the reason."""
        kept = Inference({n: p for n, p in self.proofs.items() if n in names}, dict(self.reasons))
        for name in self.proofs.keys() - kept.proofs.keys():
            for proof in self.proofs[name]:
                group = proof.group
                for layer in (*group.columns, *group.rows, *group.parameters):
                    kept.reasons[full_name(name, layer)] = reason
        return kept


def infer(
    model: nn.Module,
    calls: Mapping[str, ModuleCall],
    ranks: int,
    reserved: set[str],
    allowed: Callable[[str], bool] | None = None,
) -> Inference:
    """Finds what can be split over ``ranks`` ranks, and proves it.

    Args:
        calls: what the modules were called with in one forward pass.
        reserved: layers that are split otherwise.
        allowed: whether a layer, or a module that owns experts, may be split; all by default.
    """
    result = Inference()
    modules = dict(model.named_modules())
    free = {name for name, module in modules.items() if linear_kind(module)} - reserved
    if allowed is not None:
        free = {name for name in free if allowed(name)}
    weights = {n for n in used_directly(model) if allowed is None or allowed(n.rpartition(".")[0])}
    layers, tensors = _Below(free), _Below(weights)
    loose: dict[Any, str] | None = None  # kinds without regard to the call
    known: dict[Any, tuple[list[Proof], dict[str, str]]] = {}
    for name in reversed(list(modules)):
        module = modules[name]
        inside, own = layers.of(name), tensors.of(name)
        if not (inside or own) or _is_stack(module):
            continue
        call_of: str | None = name
        if name not in calls:
            if loose is None:
                loose = _kinds(modules, calls)
            call_of = loose.get(kind_of(module, None))
        if call_of is None:
            continue
        kind = (kind_of(modules[call_of], calls[call_of]), frozenset(inside), frozenset(own))
        if kind not in known:
            known[kind] = _analyse(name, module, calls[call_of], inside, own, ranks)
        proofs, reasons = known[kind]
        for layer, reason in reasons.items():
            result.reasons[full_name(name, layer)] = reason
        if proofs:
            result.proofs[name] = proofs
        for proof in proofs:
            done = {full_name(name, layer) for layer in (*proof.group.columns, *proof.group.rows)}
            layers.remove(done)
            done |= {full_name(name, n) for n in proof.group.parameters}
            tensors.remove(done)
            for layer in done:
                result.reasons.pop(layer, None)
    return result


class _Below:
    """Names of layers or parameters, by the modules in which they lie."""

    def __init__(self, names: Collection[str]) -> None:
        self._names: dict[str, set[str]] = {}
        for name in names:
            for path in _above(name):
                self._names.setdefault(path, set()).add(_inside(name, path))

    def of(self, path: str) -> set[str]:
        """Those inside a module, by their names there."""
        return self._names.get(path, set())

    def remove(self, names: Collection[str]) -> None:
        """Takes these away."""
        for name in names:
            for path in _above(name):
                if path in self._names:
                    self._names[path].discard(_inside(name, path))


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _inside(name: str, path: str) -> str:
    return name[len(path) + 1 :] if path else name


def _kinds(modules: Mapping[str, nn.Module], calls: Mapping[str, ModuleCall]) -> dict[Any, str]:
    """The first module of each kind that was called."""
    found: dict[Any, str] = {}
    for name, module in modules.items():
        if name in calls:
            found.setdefault(kind_of(module, None), name)
    return found


def _analyse(
    name: str,
    module: nn.Module,
    call: ModuleCall,
    free: set[str],
    weights: set[str],
    ranks: int,
) -> tuple[list[Proof], dict[str, str]]:
    inside = dict(module.named_modules())
    multiplying = [n for n in free if linear_kind(inside[n]) != "embedding"]
    reasons: dict[str, str] = {}
    proofs: list[Proof] = []
    expert = find_experts(name, module, call, weights, ranks, reasons)
    if expert is not None:
        proofs.append(expert)
    if len(multiplying) < 2:
        return proofs, reasons
    try:
        unit = Unit.of(name, module, call)
        reaches = _probe(unit, set(unit.linears), _FEW_UNITS)
        found = find_groups(reaches, free, ranks)
        if coarse := _too_coarse(reaches, found.reasons):
            reaches = reaches | _probe(unit, coarse, _MANY_UNITS)
            found = find_groups(reaches, free, ranks)
    except UnitError as error:
        return proofs, dict.fromkeys(multiplying, f"could not be run alone: {error}")
    except RuntimeError as error:  # of an operation that has no derivative
        return proofs, dict.fromkeys(multiplying, f"could not be looked at: {error}")
    reasons |= found.reasons
    taken: set[str] = set()
    for group in found.groups:
        layers = {*group.columns, *group.rows}
        if layers & taken:  # the middle one of three in a row
            continue
        proof = _prove(unit, group, reaches, free, ranks, reasons)
        if proof is not None:
            taken |= layers
            proofs.append(proof)
    return proofs, reasons


def _too_coarse(reaches: Mapping[str, Reach], reasons: Mapping[str, str]) -> set[str]:
    """Layers that might be split if their input features were probed more finely."""
    return {
        name
        for name, reach in reaches.items()
        if reach.grain > 1
        and (name in reasons or any(any(reach.outputs.get(source, [])) for source in reasons))
    }


def _prove(
    unit: Unit,
    group: LayerGroup,
    reaches: Mapping[str, Reach],
    free: set[str],
    ranks: int,
    reasons: dict[str, str],
) -> Proof | None:
    try:
        return prove_group(unit, group, ranks)
    except NotProvenError as error:
        first = str(error)
    layers = {*group.columns, *group.rows}
    for other in find_groups(reaches, free, ranks, strided=True).groups:
        if {*other.columns, *other.rows} != layers:
            continue
        try:
            return prove_group(unit, other, ranks)
        except NotProvenError:
            break
    reasons.update(dict.fromkeys(layers, first))
    return None


def _probe(unit: Unit, wanted: set[str], most_units: int) -> dict[str, Reach]:
    """What reaches what; again with other arguments where a ReLU may have let nothing through."""
    total: dict[str, Reach] = {}
    whole = unit.call
    try:
        for seed in range(3):
            if seed and not any(map(_has_gaps, total.values())):
                break
            if seed:
                unit.call = whole.mapped((), lambda _, leaf: _shaken(leaf, seed))  # noqa: B023
            for name, reach in probe(unit, wanted, most_units).items():
                if name not in total:
                    total[name] = reach
                    continue
                known = total[name]
                for mine, others in (
                    (known.outputs, reach.outputs),
                    (known.parameters, reach.parameters),
                    (known.arguments, reach.arguments),
                ):
                    _merge(mine, others)
    finally:
        unit.call = whole
    return total


def _has_gaps(reach: Reach) -> bool:
    return any(any(masks) and not all(masks) for masks in reach.outputs.values())


def _merge(mine: Any, others: Any) -> None:
    for key, masks in others.items():
        before = mine.get(key, [0] * len(masks))
        mine[key] = [a | b for a, b in zip(before, masks, strict=True)]


def _shaken(leaf: Any, seed: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
        return leaf
    if not torch.isfinite(leaf).all() or float(leaf.abs().max()) > 1e4:
        return leaf  # a mask
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
    return leaf + noise * leaf.std().clamp_min(0.1)


def _is_stack(module: nn.Module) -> bool:
    """Whether it is a model of several layers, rather than a layer."""
    return any(
        isinstance(inner, nn.ModuleList)
        and len(inner) > 1
        and any(linear_kind(m) for m in inner.modules())
        for inner in module.modules()
    )
