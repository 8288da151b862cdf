"""Calls an autograd Function, with types: torch's ``apply`` has none."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``."""
    return function.apply(*arguments)
