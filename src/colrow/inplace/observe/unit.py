"""One module under test: a private copy that is run alone, in fp64, with parts of it replaced."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.observe.calls import Key, ModuleCall, argument_names, as_double, private
from colrow.inplace.observe.following import following
from colrow.inplace.observe.linear_layers import LARGE, Factors, linear_kind
from colrow.inplace.observe.modes import NoDropout, exact_arithmetic
from colrow.inplace.observe.watch import ValueWatch

Forward = Callable[..., Any]


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
        watch: ValueWatch | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The module's result, with arguments changed and forwards of inner modules replaced.

        Args:
            watch: follows the divided values of the forward pass.
            parameters: take the place of parameters of these names.
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
            _with_parameters(self.module, parameters or {}),
        ):
            torch.default_generator.manual_seed(0)
            try:
                with following(watch):
                    return self.module(*call.args, **call.kwargs)
            except Exception as error:  # whatever the module's code raises for other sizes
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


@contextmanager
def _with_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    places = []
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        places.append((owner, last, owner._parameters[last]))
        parameters: dict[str, Any] = owner._parameters
        parameters[last] = tensor
    try:
        yield
    finally:
        for owner, last, before in places:
            owner._parameters[last] = before
