"""Blocks of transformers' code in training: a narrower number format, and recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from colrow.layers.memory_saving import Recompute, cast_parameters, recomputed

NO_SELECTIVE = (
    "recompute=selective knows the attention of the described families only, and this model is "
    "split in place: use recompute=full"
)


@dataclass(frozen=True)
class _Training:
    """How a block runs; see :func:`prepare_foreign_blocks`."""

    arithmetic: Callable[[], AbstractContextManager[object]]
    compute_dtype: torch.dtype | None
    recompute: bool


class TrainedBlockMixin(nn.Module):
    """A block whose forward is its own class's, run as ``colrow_training`` says."""

    colrow_training: _Training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As its own class's."""
        how = self.colrow_training
        if how.recompute:
            return recomputed(self._with_arithmetic, *args, draws=True, **kwargs)
        return self._in_dtype(*args, **kwargs)

    def _with_arithmetic(self, *args: Any, **kwargs: Any) -> Any:
        with self.colrow_training.arithmetic():
            return self._in_dtype(*args, **kwargs)

    def _in_dtype(self, *args: Any, **kwargs: Any) -> Any:
        with cast_parameters(self.modules(), self.colrow_training.compute_dtype):
            return super().forward(*args, **kwargs)


def prepare_foreign_blocks(
    blocks: Iterable[nn.Module],
    arithmetic: Callable[[], AbstractContextManager[object]],
    *,
    sharded: bool,
    compute_dtype: torch.dtype | None,
    recompute: Recompute,
) -> None:
    """Tells blocks how they run in training; each becomes one of a class derived from its own.

    Args:
        arithmetic: inside what results are computed, when they are computed again too.
        sharded: FSDP2 swaps their parameters while they run, and casts them itself.
        compute_dtype: of matmuls and activations; the parameters keep theirs.
        recompute: "full" keeps a block's input alone for backward.

    Raises:
        ValueError: selective recomputation, which knows no foreign attention; FSDP2 around lists of
            modules, of which ranks may use different ones.
    """
    if recompute == "selective":
        raise ValueError(NO_SELECTIVE)
    for block in blocks:
        if sharded and any(isinstance(module, nn.ModuleList) for module in block.modules()):
            raise ValueError(
                f"fsdp: {type(block).__name__} has a list of modules (experts, say), of which "
                "ranks with other tokens may use others, and FSDP2 would wait for ever: leave "
                "--fsdp out"
            )
        dtype = None if sharded else compute_dtype
        if dtype is None and recompute == "none":
            continue
        cls = type(block)
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        block.__class__ = type(cls.__name__, (TrainedBlockMixin, cls), names)
        block.__dict__["colrow_training"] = _Training(arithmetic, dtype, recompute == "full")
