"""A module taken out of the model to be looked at: a private copy, its call, its linear layers."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.inplace.calls import Key, ModuleCall, argument_names, as_double, private
from colrow.inplace.capture import exact_arithmetic
from colrow.inplace.dropout import NoDropout

# Weights with more elements are represented by factors of this rank.
LARGE = 1 << 16
RANK = 8

Forward = Callable[..., Any]


def linear_kind(module: nn.Module) -> str | None:
    """How the weight of a layer that multiplies features lies, or None for any other module.

    ``"linear"`` is ``[out, in]`` (nn.Linear), ``"conv1d"`` ``[in, out]`` (GPT-2's Conv1D),
    ``"embedding"`` ``[tokens, out]``.
    """
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    cls = type(module)
    if isinstance(module, nn.Embedding):
        plain = cls.forward is nn.Embedding.forward or _behaves(module, "embedding")
        return "embedding" if plain else None
    if isinstance(module, nn.Linear):
        plain = cls.forward is nn.Linear.forward or _behaves(module, "linear")
        return "linear" if plain else None
    return "conv1d" if cls.__name__ == "Conv1D" and _behaves(module, "conv1d") else None


def _behaves(module: nn.Module, kind: str) -> bool:
    """Whether this class computes what its kind should, tried on a small example."""
    known = _BEHAVIOUR.get((type(module), kind))
    if known is None:
        known = _BEHAVIOUR[type(module), kind] = _try(module, kind)
    return known


_BEHAVIOUR: dict[tuple[type, str], bool] = {}


def _try(module: nn.Module, kind: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(module)
    shape = (3, 5) if kind == "conv1d" else (5, 3)
    has_bias = module._parameters.get("bias") is not None
    twin.__dict__["_parameters"] = {
        "weight": nn.Parameter(torch.randn(shape, generator=generator)),
        "bias": nn.Parameter(torch.randn(5, generator=generator)) if has_bias else None,
    }
    sizes: dict[str, Any] = {"in_features": 3, "out_features": 5, "nx": 3, "nf": 5}
    sizes |= {"num_embeddings": 5, "embedding_dim": 3}
    twin.__dict__.update({n: value for n, value in sizes.items() if n in twin.__dict__})
    if "padding_idx" in twin.__dict__:
        twin.__dict__["padding_idx"] = None
    x = torch.randn(2, 4, 3, generator=generator)
    if kind == "embedding":
        x = torch.tensor([[0, 1], [4, 2]])
    try:
        with torch.no_grad():
            return torch.allclose(type(module).forward(twin, x), multiply(kind, twin, x))
    except Exception:
        return False


def output_dim(kind: str) -> int:
    """The dimension of the weight that is the layer's output features."""
    return 0 if kind == "linear" else 1


def output_features(module: nn.Module) -> int:
    """How many features a layer that multiplies features gives."""
    kind = linear_kind(module)
    assert kind is not None
    length: int = module.get_parameter("weight").shape[output_dim(kind)]
    return length


class Factors:
    """A linear map ``[.., in]`` to ``[.., out]`` in two thin matrices, for a large weight.

    Where features go does not depend on the weight, so that a map of low rank shows as much as the
    weight itself, in a fraction of the time and memory.

    Attributes:
        down: ``[rank, in]``.
        up: ``[out, rank]``.
        bias: ``[out]`` or None.
    """

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        self.down, self.up, self.bias = down, up, bias

    @classmethod
    def of(cls, module: nn.Module) -> Factors:
        """For a layer that multiplies features: its own small weight, or random factors."""
        kind = linear_kind(module)
        assert kind is not None and kind != "embedding"
        weight: Any = module.weight
        bias: Any = getattr(module, "bias", None)
        bias = None if bias is None else bias.detach()
        weight = weight.detach() if kind == "linear" else weight.detach().t()
        out, inside = weight.shape
        if weight.numel() <= LARGE:
            if inside <= out:
                return cls(torch.eye(inside, dtype=weight.dtype), weight, bias)
            return cls(weight, torch.eye(out, dtype=weight.dtype), bias)
        generator = torch.Generator().manual_seed(out * 31 + inside)
        down = torch.randn(RANK, inside, generator=generator, dtype=weight.dtype)
        up = torch.randn(out, RANK, generator=generator, dtype=weight.dtype)
        return cls(down / inside**0.5, up / RANK**0.5, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)


def multiply(kind: str, module: nn.Module, x: Tensor) -> Tensor:
    """What such a layer computes."""
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    if kind == "embedding":
        return F.embedding(x, weight)
    return F.linear(x, weight if kind == "linear" else weight.t(), bias)


class UnitError(Exception):
    """A module's own code failed when it was run alone or with smaller sizes."""


@dataclass
class Unit:
    """A copy of one module in fp64 on the CPU, with weights that are random enough to tell apart.

    Attributes:
        name: where it is in the model.
        module: the copy.
        call: what it was called with.
        linears: its layers that multiply features, by name inside it.
        factors: what stands for their weights.
        training: whether it runs as in training, but for dropout, of which there is none.
    """

    name: str
    module: nn.Module
    call: ModuleCall
    linears: dict[str, nn.Module]
    factors: dict[str, Factors]
    training: bool = False

    @classmethod
    def of(cls, name: str, module: nn.Module, call: ModuleCall) -> Unit:
        """A private copy of ``module``."""
        # Large weights are not copied: factors stand for them, and this for their shape.
        memo: dict[int, Any] = {
            id(weight): nn.Parameter(torch.zeros(1, dtype=torch.float64).expand(weight.shape))
            for inner in module.modules()
            if linear_kind(inner) not in (None, "embedding")
            and (weight := inner.get_parameter("weight")).numel() > LARGE
        }
        for path, parameter in module.named_parameters():
            if id(parameter) not in memo and parameter.numel() > 1 and not any(parameter.stride()):
                raise UnitError(f"{path} is too large to be made up")
        try:
            twin = copy.deepcopy(module, memo)
        except (RuntimeError, TypeError) as error:
            raise UnitError(f"cannot be copied: {error}") from error
        if any(p.is_meta for p in twin.parameters()) or any(b.is_meta for b in twin.buffers()):
            twin = twin.to_empty(device="cpu")
            for buffer in twin.buffers():
                buffer.fill_(1)
            for parameter in twin.parameters():
                parameter.data.fill_(1 if parameter.dim() < 2 else 0)
        twin = twin.to("cpu", torch.float64).eval()
        _randomise(twin)
        names = argument_names(module)
        call = call.mapped(names, lambda _, leaf: as_double(leaf))
        linears = {n: m for n, m in twin.named_modules() if linear_kind(m)}
        factors = {n: Factors.of(m) for n, m in linears.items() if linear_kind(m) != "embedding"}
        return cls(name, twin, call, linears, factors)

    def run(
        self,
        change: Callable[[Key, Any], Any] | None = None,
        replaced: Mapping[str, Forward] | None = None,
        watch: AbstractContextManager[object] | None = None,
    ) -> Any:
        """The module's result, with arguments changed and forwards of inner modules replaced.

        Args:
            watch: what the forward is run in.
        """
        names = argument_names(self.module)
        call = self.call.mapped(
            names, lambda key, leaf: private(change(key, leaf) if change else leaf)
        )
        self.module.train(self.training)
        forwards = {
            n: lambda x, *_, factors=factors: factors(x) for n, factors in self.factors.items()
        }
        forwards |= replaced or {}
        forwards = {n: _as_layer(f) if n in self.linears else f for n, f in forwards.items()}
        with (
            exact_arithmetic(),
            NoDropout(),
            torch.random.fork_rng(devices=[]),
            _replaced(self.module, forwards),
        ):
            torch.default_generator.manual_seed(0)
            try:
                with watch or nullcontext():
                    return self.module(*call.args, **call.kwargs)
            except (
                Exception
            ) as error:  # whatever the model's code raises for sizes it did not expect
                lines = str(error).strip().splitlines()
                raise UnitError(lines[0][:160] if lines else type(error).__name__) from error


def _as_layer(forward: Forward) -> Forward:
    """The forward of a layer of one input, given by position or by name."""
    return lambda *args, **named: forward(*args, *named.values())


def _randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(True)
            if parameter.numel() > 1 and not any(parameter.stride()):
                continue  # it stands for a large weight
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = float(parameter.std()) if parameter.numel() > 1 else 0.0
            scale = max(scale, 0.05) if scale == scale else 0.05
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)


@contextmanager
def _replaced(module: nn.Module, forwards: Mapping[str, Forward]) -> Iterator[None]:
    targets = [(module.get_submodule(name), forward) for name, forward in forwards.items()]
    for target, forward in targets:
        target.__dict__["forward"] = forward
    try:
        yield
    finally:
        for target, _ in targets:
            target.__dict__.pop("forward", None)
