"""Whether what every rank of a tp group is taken to hold is the same on all of them.

What nothing says about is taken as held whole by every rank only if its values are equal; what is
declared so may differ by rounding. Anything else is refused by name: written by one rank for all it
would be read back wrong, without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.comm import primitives
from colrow.comm.compat import local_tensor
from colrow.comm.group import ParallelGroup

# How far apart relative to its norm: rounding, of which steps of an optimiser make more.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE_ROUNDING = 1e-2
_EQUAL = 1e-12  # of sums in fp64
_SMALLEST = 1e-4  # of the largest norm: what is smaller is compared with that
_KEYS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xABC98388FB8FAC03)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that every rank of the group is taken to hold.

    Attributes:
        name: of the parameter, or of what belongs to it.
        tensor: this rank's; None where it has none now, as a gradient.
        declared: something says that every rank holds it.
        owner: the class of the module that it belongs to.
    """

    name: str
    tensor: Tensor | None
    declared: bool
    owner: str = ""


def problem_of(held: Iterable[HeldTensor], tp: ParallelGroup, *, rounds: bool = False) -> str:
    """What is wrong, the same on all ranks of the group; "" when nothing is.

    Args:
        rounds: whether undeclared ones may differ by rounding too, as gradients.

    Communicates: two all-reduces, of 16 bytes, and of 80 bytes for each tensor.
    """
    found = [one for one in held if one.tensor is None or not one.tensor.is_meta]
    if tp.size == 1 or not found:
        return ""
    device = next((h.tensor.device for h in found if h.tensor is not None), torch.device("cpu"))
    names = rng.stream_key(0, *(h.name for h in found)) >> 1
    order = torch.tensor([names, -names], device=device)
    first, last = primitives.all_reduce(order, tp, op="max", layer="same").tolist()
    if first != -last:
        return f"the ranks of this {tp.name} group have modules or optimiser states of other names"
    mine = torch.stack([_sketch(h.tensor, device) for h in found])
    both = primitives.all_reduce(torch.cat([mine, -mine]), tp, op="max", layer="same").cpu()
    top, low = both[: len(found)], -both[len(found) :]
    norms = top[:, 0]
    scale = norms.clamp(min=_SMALLEST * float(norms.max())) if rounds else norms
    limits = torch.tensor([_limit(h, rounds) for h in found], dtype=torch.float64)
    apart = (top - low)[:, :-1].amax(1)
    differs = (apart > limits * scale) | (top[:, -1] != low[:, -1])
    return _described([h for h, other in zip(found, differs.tolist(), strict=True) if other], tp)


def check_same(held: Iterable[HeldTensor], tp: ParallelGroup, *, rounds: bool = False) -> None:
    """Raises ValueError on every rank of the group, as :func:`problem_of` says."""
    if problem := problem_of(held, tp, rounds=rounds):
        raise ValueError(problem)


def owner_of(module: nn.Module, name: str) -> str:
    """The class of the module inside ``module`` that has the parameter or buffer of this name."""
    return type(module.get_submodule(name.rpartition(".")[0])).__name__


def _limit(held: HeldTensor, rounds: bool) -> float:
    if held.tensor is None or not (held.declared or rounds):
        return _EQUAL
    return _ROUNDING.get(held.tensor.dtype, _COARSE_ROUNDING)


def _sketch(tensor: Tensor | None, device: torch.device) -> Tensor:
    """Norm, three sums with signs as if drawn, and a number for shape and dtype; fp64."""
    total = torch.zeros(len(_KEYS) + 2, dtype=torch.float64, device=device)
    if tensor is None:
        total[-1] = -1
        return total
    tensor = local_tensor(tensor)
    flat = tensor.detach().reshape(-1).to(device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.float64)
        place = torch.arange(start + 1, start + 1 + part.numel(), device=device)
        total[0] += part.square().sum()
        for row, key in enumerate(_KEYS):
            # The highest bit of a multiple of an odd number: as good as drawn, for this.
            sign = (place * (key - (1 << 64))).bitwise_right_shift(63) * 2 + 1
            total[1 + row] += (part * sign).sum()
    total[0] = total[0].sqrt()
    total.nan_to_num_(1e300, 2e300, -2e300)  # so that they can be compared
    total[-1] = rng.stream_key(0, tuple(tensor.shape), tensor.dtype) >> 12  # exact in fp64
    return total


def _described(different: Sequence[HeldTensor], tp: ParallelGroup) -> str:
    unknown = [h for h in different if not h.declared]
    if unknown:
        one = unknown[0]
        module, _, last = one.name.rpartition(".")
        return (
            f"{_some(unknown)} differ between the ranks of this {tp.name} group, and nothing says "
            f"how they are divided: give {module or 'the module'} ({one.owner}) an attribute "
            f"{last}_spec, a colrow.ShardSpec that says which part each rank holds "
            "(ShardSpec.replicated(*shape) where all hold the same up to rounding), or add the "
            "module before colrow.parallelize"
        )
    if different:
        return (
            f"{_some(different)} should be the same on all ranks of this {tp.name} group, but the "
            "ranks have drifted apart: they were given different batches, or took different steps"
        )
    return ""


def _some(held: Sequence[HeldTensor]) -> str:
    shown = ", ".join(h.name for h in held[:3])
    return shown if len(held) <= 3 else f"{shown} and {len(held) - 3} more"
