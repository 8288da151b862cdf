"""Random numbers between a column-parallel layer and its row-parallel one.

There each rank has features of its own, so it needs masks of its own, and draws as many numbers as
it has features. Elsewhere all ranks have the same activations and must draw the same masks. So the
ranks' generators part at the first column-parallel layer and are put together again at the row-
parallel one (as Megatron-LM's tracker of random states does it, by a second state).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.comm.group import ParallelGroup


class Stream:
    """The generator of one group of split layers. Sends nothing: the ranks' seeds must agree."""

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


def drops_out(module: nn.Module, configurations: dict[int, bool]) -> bool:
    """Whether a module, or a configuration that it holds, has a probability of dropout.

    Args:
        configurations: by id, those whose answer is known; new ones are added.
    """
    for inner in module.modules():
        if isinstance(inner, nn.Dropout) and inner.p > 0:
            return True
        for name, value in vars(inner).items():
            if hasattr(value, "to_dict"):
                if id(value) not in configurations:
                    configurations[id(value)] = any(map(_drops, vars(value).items()))
                if configurations[id(value)]:
                    return True
            elif _drops((name, value)):
                return True
    return False


def _drops(item: tuple[str, Any]) -> bool:
    name, value = item
    return isinstance(value, float) and "drop" in name and value > 0
