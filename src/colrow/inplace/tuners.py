"""Layers that PEFT has put around a model's own."""

from __future__ import annotations

import sys

from torch import nn


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether it is a layer of any kind that PEFT has put around one of the model."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def inside_adapter_layers(model: nn.Module) -> dict[str, str]:
    """Names of all modules in such layers, and of the kind of layer that each is in."""
    return {
        f"{name}.{inner}" if inner else name: type(module).__module__.split(".")[-2]
        for name, module in model.named_modules()
        if is_adapter_layer(module)
        for inner, _ in module.named_modules()
    }
