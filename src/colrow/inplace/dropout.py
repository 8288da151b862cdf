"""Dropout as a model's code calls it, and a mode in which none happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ALPHA = frozenset({F.alpha_dropout, F.feature_alpha_dropout})
_DROPOUTS = _ALPHA | {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
_NAMES = ("input", "p", "training")
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class Dropout:
    """A call of one of torch's dropouts.

    Attributes:
        function: which.
        input: what it is to drop from.
        p: the share to drop.
        training: whether it is asked to drop at all.
    """

    function: Callable[..., Tensor]
    input: Tensor
    p: float
    training: bool

    @property
    def drops(self) -> bool:
        """Whether it would drop anything."""
        return self.training and self.p != 0

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies with a mask and does nothing else."""
        return self.function not in _ALPHA


def dropout_call(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Dropout | None:
    """What a call asks for, however its arguments are given; None for any other function.

    ``torch.dropout`` names ``train`` what those of ``torch.nn.functional`` name ``training``; of
    them those with ``alpha`` in their names drop nothing unless told to.
    """
    if func not in _DROPOUTS:
        return None
    named = dict(zip(_NAMES, args, strict=False)) | dict(kwargs or {})
    training = named.get("training", named.get("train", func not in _ALPHA))
    return Dropout(func, named["input"], float(named.get("p", 0.5)), bool(training))


class NoDropout(TorchFunctionMode):
    """Inside it, dropout drops nothing.

    Attributes:
        met: whether any was asked for that would have dropped something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replaces dropout by the identity, and the dropout of fused attention by none."""
        if (call := dropout_call(func, args, kwargs)) is not None:
            self.met |= call.drops
            return call.input
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        options = dict(zip(_ATTENTION, args, strict=False)) | dict(kwargs or {})
        self.met |= options.get("dropout_p", 0.0) > 0
        return func(**{**options, "dropout_p": 0.0})
