"""Which features of one layer reach which of another, by derivatives.

For one module, every layer that multiplies features is cut: its output becomes a leaf of the
autograd graph. The derivative of input feature j of layer B with respect to such a leaf is zero
exactly where nothing leads from there to j without passing another such layer. Parameters that are
used directly and tensors that the module was given are leaves as well, in each of their dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from colrow.inplace.observe.calls import Key
from colrow.inplace.observe.linear_layers import linear_kind, multiply
from colrow.inplace.observe.unit import Unit, UnitError

_CHUNK_ELEMENTS = 1 << 18


@dataclass
class Reach:
    """What reaches the input features of one layer.

    A set of input features is an integer whose bit j stands for the j-th unit of them.

    Attributes:
        features: how many input features the layer has.
        grain: how many neighbouring features are looked at as one; the last unit may be smaller.
        outputs: for each other layer, for each of its output features, what that reaches.
        parameters: for each parameter used directly and each of its dimensions, the same.
        arguments: for each tensor given to the module and each of its dimensions, the same.
    """

    features: int
    grain: int = 1
    outputs: dict[str, list[int]] = field(default_factory=dict)
    parameters: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    arguments: dict[tuple[Key, int], list[int]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """How many units of input features there are."""
        return -(-self.features // self.grain)

    @property
    def everything(self) -> int:
        """The set of all units."""
        return (1 << self.width) - 1


def probe(unit: Unit, wanted: set[str], most_units: int = 512) -> dict[str, Reach]:
    """What reaches the input of each layer in ``wanted`` that the module calls, by name.

    Args:
        most_units: neighbouring input features are taken together where there are more.
    """
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}

    def cut(name: str) -> Any:
        module = unit.linears[name]
        kind = linear_kind(module)
        assert kind is not None

        def forward(x: Tensor, *_: Any) -> Tensor:
            if x.is_nested:
                raise UnitError(f"{name} is given a nested tensor")
            factors = unit.factors.get(name)
            y = multiply(kind, module, x) if factors is None else factors(x.detach())
            y = y.detach().requires_grad_()
            outputs.setdefault(name, []).append(y)
            if x.is_floating_point():
                inputs.setdefault(name, []).append(x)
            return y

        return forward

    arguments: dict[Key, Tensor] = {}

    def leaf(key: Key, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = arguments[key] = value.clone().requires_grad_()
        return value

    unit.run(leaf, {name: cut(name) for name in unit.linears})
    owned = {id(p) for name in outputs for p in unit.linears[name].parameters(recurse=False)}
    parameters = {
        name: parameter
        for name, parameter in unit.module.named_parameters()
        if id(parameter) not in owned
    }
    leaves = [y for ys in outputs.values() for y in ys]
    leaves += [*parameters.values(), *arguments.values()]
    found = {}
    for name in wanted & set(inputs):
        widths = {x.shape[-1] for x in inputs[name]}
        if len(widths) > 1 or not any(x.requires_grad for x in inputs[name]):
            continue
        live = _reaching(inputs[name], leaves)
        of_layers = sum(map(len, outputs.values()))
        if not any(live[:of_layers]):
            continue
        (width,) = widths
        grain = _grain(width, most_units)
        reach = Reach(width, grain)
        some = [leaf for leaf, reaches in zip(leaves, live, strict=True) if reaches]
        seen = iter(patterns(inputs[name], some, grain, vectors=sum(live[:of_layers])))
        reached = [
            next(seen) if reaches else _nothing(leaf)
            for leaf, reaches in zip(leaves, live, strict=True)
        ]
        position = 0
        for other, ys in outputs.items():
            reach.outputs[other] = _union([reached[position + i][-1] for i in range(len(ys))])
            position += len(ys)
        for other, parameter in parameters.items():
            for dim in range(parameter.dim()):
                reach.parameters[other, dim] = reached[position][dim]
            position += 1
        for key, value in arguments.items():
            for dim in range(value.dim()):
                reach.arguments[key, dim] = reached[position][dim]
            position += 1
        found[name] = reach
    return found


def _reaching(targets: list[Tensor], leaves: list[Tensor]) -> list[bool]:
    """For each leaf, whether the graph leads from it to a target."""
    total: Any = sum(x.sum() for x in targets if x.requires_grad)
    grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    return [grad is not None for grad in grads]


def _nothing(leaf: Tensor) -> dict[int, list[int]]:
    """The patterns of a leaf that reaches nothing."""
    empty = {dim: [0] * length for dim, length in enumerate(leaf.shape)}
    return empty | {-1: empty[leaf.dim() - 1] if empty else []}


def _union(patterns: list[list[int]]) -> list[int]:
    first, *others = patterns
    for other in others:
        first = [a | b for a, b in zip(first, other, strict=True)]
    return first


def _grain(width: int, most_units: int) -> int:
    """How many features to take together: few enough units, and whole heads where there are any."""
    smallest = -(-width // most_units)
    powers = [grain for grain in (1, 2, 4, 8, 16, 32, 64) if grain >= smallest]
    return next((grain for grain in powers if width % grain == 0), smallest)


def patterns(
    targets: list[Tensor], leaves: list[Tensor], grain: int = 1, *, vectors: int = 0
) -> list[dict[int, list[int]]]:
    """For each leaf and dim, for each index, the set of features of the targets it reaches.

    The last dim is also there as -1.

    Args:
        vectors: of so many leaves, the first, only the last dim is looked at.
    """
    whole = targets[0].shape[-1]
    width = -(-whole // grain)
    total = sum(leaf.numel() for leaf in leaves)
    chunk = max(1, min(width, _CHUNK_ELEMENTS // max(1, total)))
    dims = [range(x.dim())[-1 if i < vectors else 0 :] for i, x in enumerate(leaves)]
    rows: list[dict[int, list[Tensor]]] = [{dim: [] for dim in mine} for mine in dims]
    weights = random_like(targets, seed=0)
    for start in range(0, width, chunk):
        features = range(start, min(width, start + chunk))
        grads = _derivatives(targets, weights, features, leaves, grain)
        for leaf, grad, by_dim in zip(leaves, grads, rows, strict=True):
            reaches = None if grad is None else grad != 0
            for dim, parts in by_dim.items():
                if reaches is None:
                    hit = torch.zeros(len(features), leaf.shape[dim], dtype=torch.bool)
                else:
                    others = tuple(d + 1 for d in range(leaf.dim()) if d != dim)
                    hit = reaches.any(others) if others else reaches
                parts.append(hit)
    found = [{dim: _masks(torch.cat(parts)) for dim, parts in by_dim.items()} for by_dim in rows]
    return [
        masks | {-1: masks[leaf.dim() - 1] if masks else []}
        for leaf, masks in zip(leaves, found, strict=True)
    ]


def random_like(tensors: Iterable[Tensor], seed: int) -> list[Tensor]:
    """Normal numbers in fp64, of the shapes of these tensors: as gradients of results."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in tensors]


def _derivatives(
    targets: list[Tensor],
    weights: list[Tensor],
    features: range,
    leaves: list[Tensor],
    grain: int,
) -> list[Tensor | None]:
    """``[features, *leaf]`` for each leaf: how feature j of the targets changes with it."""
    cotangents = []
    for x, weight in zip(targets, weights, strict=True):
        grad = torch.zeros(len(features), *x.shape, dtype=x.dtype)
        for row, j in enumerate(features):
            some = slice(j * grain, (j + 1) * grain)
            grad[row, ..., some] = weight[..., some]
        cotangents.append(grad)
    live = [(x, g) for x, g in zip(targets, cotangents, strict=True) if x.requires_grad]
    outputs, batched = [x for x, _ in live], [g for _, g in live]
    try:
        result = torch.autograd.grad(
            outputs, leaves, batched, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return list(result)
    except (RuntimeError, NotImplementedError):  # a node that cannot be batched: one by one
        each = [
            torch.autograd.grad(
                outputs, leaves, [g[row] for g in batched], retain_graph=True, allow_unused=True
            )
            for row in range(len(features))
        ]
        return [
            None if column[0] is None else torch.stack([g for g in column if g is not None])
            for column in zip(*each, strict=True)
        ]


def _masks(hit: Tensor) -> list[int]:
    """``[features, rows]`` to, for each row, the set of features."""
    rows = hit.t().to(torch.int32)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).unflatten(1, (-1, 8))
    octets = (rows << torch.arange(8, dtype=torch.int32)).sum(-1)
    width = octets.shape[1]
    packed = bytes(octets.flatten().tolist())
    return [
        int.from_bytes(packed[start : start + width], "little")
        for start in range(0, len(packed), width)
    ]
