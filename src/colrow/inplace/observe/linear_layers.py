"""Layers that multiply features (linear layers and embeddings), also inside those of PEFT."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Weights with more elements are represented by factors of this rank.
LARGE = 1 << 16
RANK = 8


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
    """What a layer of this kind (see :func:`linear_kind`) computes for ``x``."""
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    if kind == "embedding":
        return F.embedding(x, weight)
    return F.linear(x, weight if kind == "linear" else weight.t(), bias)


def plain_table(module: nn.Embedding) -> bool:
    """Whether an embedding has none of the options for which a rank needs all of its rows."""
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _is_known_adapter(module: nn.Module) -> bool:
    """Whether it is a LoRA or DoRA layer of PEFT around a layer that multiplies features."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module) not in (layers.Linear, layers.Embedding):
        return False
    adapted: Any = module
    kind = linear_kind(adapted.base_layer)
    table = type(module) is layers.Embedding
    variants = {type(variant).__name__ for variant in adapted.lora_variant.values()}
    known = variants <= (set() if table else {"DoraLinearVariant"})
    return known and kind is not None and (kind == "embedding") == table


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA layers that can be split with the layers that they wrap, by name."""
    return {name: module for name, module in model.named_modules() if _is_known_adapter(module)}


@contextmanager
def without_adapters(*models: nn.Module) -> Iterator[bool]:
    """The models as they were before LoRA, for a while: each wrapped layer in its wrapper's place.

    Yields whether there was anything to take out.
    """
    places = [
        (parent, name, module)
        for model in models
        for parent in model.modules()
        for name, module in parent._modules.items()
        if module is not None and _is_known_adapter(module)
    ]
    for parent, name, module in places:
        parent._modules[name] = module.base_layer  # type: ignore[assignment]
    try:
        yield bool(places)
    finally:
        for parent, name, module in places:
            parent._modules[name] = module


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether it is a layer of any kind that PEFT has put around one of the model."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def inside_adapter_layers(model: nn.Module) -> dict[str, str]:
    """Names of all modules in PEFT's layers, and of PEFT's method (``lora``, ``ia3``, ...)."""
    return {
        f"{name}.{inner}" if inner else name: type(module).__module__.split(".")[-2]
        for name, module in model.named_modules()
        if is_adapter_layer(module)
        for inner, _ in module.named_modules()
    }
