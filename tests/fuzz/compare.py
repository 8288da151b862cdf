"""When two tensors, results or sets of gradients are the same up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LIMIT = 1e-9
# A gradient of exactly 0, such as an attention's key bias has, is one of rounding errors in fact:
# it is compared relative to this share of all gradients' norm.
_SMALLEST = 1e-4


def difference(
    what: str, ours: Tensor, whole: Tensor, limit: float = LIMIT, scale: float = 0.0
) -> list[str]:
    """One sentence when the tensors differ by more than ``limit``, relative to the whole's norm.

    Args:
        scale: the least norm to be relative to.
    """
    ours, whole = ours.detach(), whole.detach()
    if ours.shape != whole.shape:
        return [f"{what} has the shape {tuple(ours.shape)}, not {tuple(whole.shape)}"]
    if ours.dtype != whole.dtype:
        return [f"{what} has the dtype {ours.dtype}, not {whole.dtype}"]
    if not whole.is_floating_point():
        return [] if torch.equal(ours, whole) else [f"{what} differs"]
    finite = whole.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return [f"{what} is finite elsewhere"]
    ours, whole = ours[finite], whole[finite]
    error = float((ours - whole).norm())
    size = max(float(whole.norm()), scale)
    if error <= limit * size or error < 1e-13:
        return []
    return [f"{what} is off by {error / size if size else error:.1e}"]


def results(what: str, ours: Any, whole: Any, limit: float = LIMIT) -> list[str]:
    """As :func:`difference`, for tensors in tuples, lists, dictionaries and model outputs."""
    mine, theirs = flat(ours), flat(whole)
    if len(mine) != len(theirs):
        return [f"{what} has {len(mine)} tensors, not {len(theirs)}"]
    wrong = []
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        wrong += difference(f"{what}[{i}]" if len(mine) > 1 else what, a, b, limit)
    return wrong


def flat(value: Any) -> list[Tensor]:
    """The tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in flat(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in flat(item)]
    return []


def gradients(
    what: str, ours: Mapping[str, Tensor], whole: Mapping[str, Tensor], limit: float = LIMIT
) -> list[str]:
    """The worst of the gradients that differ, and those that only one side has."""
    scale = _SMALLEST * float(sum(g.double().square().sum() for g in whole.values()) ** 0.5)
    wrong = []
    for name, grad in whole.items():
        if name in ours:
            wrong += difference(f"{what} {name}", ours[name], grad, limit, scale)
        elif float(grad.norm()) > 1e-9 * scale:
            wrong.append(f"{what} {name} is missing")
    wrong += [
        f"{what} {n} is there, the whole has none"
        for n, g in ours.items()
        if n not in whole and g.any()
    ]
    return wrong[:3] + ([f"and {len(wrong) - 3} more"] if len(wrong) > 3 else [])
