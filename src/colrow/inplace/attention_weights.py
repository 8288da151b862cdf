"""Attention weights of a split model are those of a rank's own heads, so nobody gets them."""

from __future__ import annotations

from typing import Any

from torch import nn


def refuse_attention_weights(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A forward pre-hook.

    Raises:
        ValueError: when the caller asks for attention weights.
    """
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    if asked:
        raise ValueError(
            "output_attentions: each rank computes the attention weights of its own heads only; "
            "take them from the model before it is parallelised"
        )
