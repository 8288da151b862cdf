"""Between a column-parallel layer and its row-parallel one: only proven ways, and random numbers.

What a column-parallel layer gives is this rank's features. Inside the module for which a split was
proven they go to a row-parallel layer, whose result is whole. A part of the model's code that no
sample batch reached may call such a layer from elsewhere, or return what it gives: that is an
error, and never a number.

There each rank has features of its own, so it needs dropout masks of its own, and draws as many
numbers as it has features. Elsewhere all ranks have the same activations and must draw the same. So
the ranks' generators part at the column-parallel layer and join at the row-parallel one (as
Megatron-LM's tracker of random states does it, by a second state).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.record import REACH_IT


@dataclass(eq=False)
class Pair:
    """One group of split layers while the model runs.

    Attributes:
        module: the name of the module for which the split was proven; "" is the model itself.
        changed: whether numbers of that module, such as its heads, are this rank's.
        inside: whether that module's forward is running.
        open: a column-parallel layer whose features have not come to a row-parallel one.
        joined: whether a row-parallel layer has run in this forward.
    """

    module: str
    changed: bool
    inside: bool = False
    open: str = ""
    joined: bool = False

    def column(self, layer: str) -> None:
        """Notes a call of a column-parallel layer.

        Raises:
            ValueError: outside of the module.
        """
        if torch.compiler.is_compiling():
            return
        if not self.inside and self.module:
            raise ValueError(
                f"{layer} holds some output features on each rank and was called from outside of "
                f"{self.module}, in which alone its split was proven; {REACH_IT}"
            )
        self.open = layer

    def row(self) -> None:
        """Notes a call of a row-parallel layer."""
        if not torch.compiler.is_compiling():
            self.open, self.joined = "", True

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the module."""
        if not torch.compiler.is_compiling():
            self.inside, self.open, self.joined = True, "", False

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the module.

        Raises:
            ValueError: its forward went a way in which features stay divided.
        """
        if torch.compiler.is_compiling():
            return
        self.inside = False
        name = self.module or "the model"
        if self.open:
            layer, self.open = self.open, ""
            raise ValueError(
                f"{name} went a way that was not proven: what {layer} gives are this rank's "
                f"features, and no row-parallel layer follows; {REACH_IT}"
            )
        if self.changed and not self.joined:
            raise ValueError(
                f"{name} went a way that was not proven, past all of its split layers, with this "
                f"rank's part of its heads or widths; {REACH_IT}"
            )

    def __deepcopy__(self, memo: Any) -> Pair:
        return Pair(self.module, self.changed)


class Stream:
    """Random numbers of one group of split layers. Sends nothing: the ranks' seeds must agree."""

    def __init__(self, tp: ParallelGroup) -> None:
        self.tp = tp
        self._outside: Tensor | None = None

    def part(self, x: Tensor) -> None:
        """From here on this rank draws numbers of its own on the device of ``x``."""
        if self._outside is not None or torch.compiler.is_compiling():
            return
        seed = int(torch.randint(1 << 62, (), device=x.device))  # moves all ranks' alike
        self._outside = _generator(x.device).get_state()
        _generator(x.device).manual_seed(rng.stream_key(seed, f"tp {self.tp.rank}") % (1 << 62))

    def join(self, x: Tensor) -> None:
        """From here on all ranks draw the same numbers again."""
        if self._outside is not None:
            _generator(x.device).set_state(self._outside)
            self._outside = None

    def __deepcopy__(self, memo: Any) -> Stream:
        return Stream(self.tp)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
