"""A model without values, made runnable: a private copy with made-up weights of low rank.

What can be split does not depend on the weights, so a model on the meta device is analysed in a
copy. The weight of a large layer is two thin matrices there, whose product it would be; no whole
weight exists. The same product, of a rank's rows alone, fills the split model for its check.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.inplace.apply.record import SplitRecord
from colrow.inplace.find.shard_groups import indices_of
from colrow.inplace.find.styles import pattern_of
from colrow.inplace.observe.linear_layers import LARGE, RANK, Factors, linear_kind
from colrow.inplace.observe.modes import FunctionMode
from colrow.inplace.weights.load import allocate
from colrow.partition import ShardSpec


class StandIn:
    """The copy of a model on the meta device, in fp64 on the CPU.

    Attributes:
        model: the copy; to be run inside :meth:`running`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._factors: dict[str, Factors] = {}  # by parameter name; their product is the weight
        self._values: dict[str, Tensor] = {}  # of the other parameters, by pattern of their names
        memo: dict[int, Any] = {}
        names: dict[int, str] = {}
        large = {
            id(module.get_parameter("weight"))
            for module in model.modules()
            if isinstance(module, nn.Embedding) or linear_kind(module)
            if module.get_parameter("weight").numel() > LARGE
        }
        for name, parameter in model.named_parameters():
            names[id(parameter)] = name
            if id(parameter) in large:
                self._factors[name] = _factors(name, tuple(parameter.shape))
                value = torch.zeros(1, dtype=torch.float64).expand(parameter.shape)
            else:
                value = self._value(name, parameter)
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        self.model = copy.deepcopy(model, memo).to(torch.float64)
        self._tables: dict[int, Factors] = {}
        for inner, twin in zip(model.modules(), self.model.modules(), strict=True):
            weight = inner._parameters.get("weight")
            if weight is None or id(weight) not in large:
                continue
            factors, kind = self._factors[names[id(weight)]], linear_kind(inner)
            self._tables[id(twin._parameters["weight"])] = factors
            if kind in ("linear", "conv1d"):
                bias: Any = twin._parameters.get("bias")
                twin.__dict__["forward"] = _forward(factors, bias, transposed=kind == "conv1d")

    def _value(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Layers of one kind share the memory of what is not in two thin matrices."""
        large = parameter.numel() > LARGE
        key = f"{pattern_of(name)} {tuple(parameter.shape)}" if large else name
        if key not in self._values:
            self._values[key] = _random(key, tuple(parameter.shape))
        return self._values[key]

    @contextmanager
    def running(self) -> Iterator[None]:
        """What forward passes of the copy must happen in; its embeddings need it."""
        with _Tables(self._tables):
            yield

    def fill(
        self, model: nn.Module, record: SplitRecord, device: torch.device
    ) -> list[Callable[[], None]]:
        """Gives the split model its part of these weights; returns what puts it on meta again."""

        def value(name: str, like: Tensor) -> Tensor:
            return self.part(name, like, record.specs.get(name), record.tp.rank).to(device)

        emptied = allocate(model, value)
        record.undo += emptied
        return emptied

    @property
    def small(self) -> set[str]:
        """The parameters whose gradients take little memory."""
        return {n for n, p in self.model.named_parameters() if p.numel() <= LARGE}

    def part(self, name: str, like: Tensor, spec: ShardSpec | None, rank: int) -> Tensor:
        """A rank's part of a parameter's made-up value, in the dtype of ``like``.

        Args:
            name: the parameter's first name in the model.
            spec: how it is divided; None for one that is not.
        """
        indices = None
        if spec is not None and spec.dim is not None:
            indices = torch.tensor(indices_of(spec, rank), dtype=torch.long)
        if name not in self._factors:
            value = self.model.get_parameter(name).detach()
            if indices is not None and spec is not None and spec.dim is not None:
                value = value.index_select(spec.dim, indices)
            return value.to(like.dtype)
        up, down = self._factors[name].up, self._factors[name].down
        if indices is not None and spec is not None:
            if spec.dim == 0:
                up = up.index_select(0, indices)
            else:
                down = down.index_select(1, indices)
        result = torch.empty(up.shape[0], down.shape[1], dtype=like.dtype)
        step = max(1, LARGE // max(1, down.shape[1]))
        for start in range(0, up.shape[0], step):
            result[start : start + step] = up[start : start + step] @ down
        return result


def _factors(name: str, shape: tuple[int, ...]) -> Factors:
    """Of a weight ``[rows, columns]``: a small matrix of its own between two shared thin ones."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    own = torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)
    rows, columns = shape
    return Factors(own @ _thin(columns).t() / columns**0.5, _thin(rows) / RANK, None)


@cache
def _thin(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, RANK, generator=generator, dtype=torch.float64)


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) < 2:
        noise *= 0.1
        return noise if "bias" in name.rpartition(".")[2] else noise + 1
    fan_in: float = noise.numel() / shape[0]
    return noise / math.sqrt(fan_in)


def _forward(factors: Factors, bias: Tensor | None, *, transposed: bool) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any) -> Tensor:
        if transposed:
            return F.linear(F.linear(x, factors.up.t()), factors.down.t(), bias)
        return F.linear(F.linear(x, factors.down), factors.up, bias)

    return forward


class _Tables(FunctionMode):
    """Inside it, looking up a weight that is two thin matrices gives rows of their product."""

    def __init__(self, tables: Mapping[int, Factors]) -> None:
        super().__init__()
        self.tables = tables

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Replaces embedding and linear with such a weight."""
        if func in (F.embedding, F.linear):
            named = dict(zip(("input", "weight", "third"), args, strict=False)) | kwargs
            factors = self.tables.get(id(named["weight"]))
            if factors is not None and func is F.embedding:
                vectors: Tensor = F.embedding(named["input"], factors.up) @ factors.down
                return vectors
            if factors is not None:
                bias = named.get("third", named.get("bias"))
                return F.linear(F.linear(named["input"], factors.down), factors.up, bias)
        return func(*args, **kwargs)
