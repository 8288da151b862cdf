"""Where the ranks of tests compute: on CPUs, on GPUs, or on what pretends to be one."""

from __future__ import annotations

import io
import pickle
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

Device = Literal["cpu", "cuda", "pretend"]
_kept = ExitStack()
NAMES: tuple[Device, ...] = ("cpu", "cuda", "pretend")


def gpus(device: Device) -> int:
    """How many the ranks have."""
    return torch.cuda.device_count() if device == "cuda" else 0


def backend(device: Device, ranks: int) -> str:
    """NCCL where each of these ranks has a GPU of its own; Gloo where they share."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" and gpus(device) >= ranks else "gloo"


def enter(device: Device, rank: int) -> None:
    """Makes a GPU the default device of this process; with fewer GPUs than ranks they share."""
    if device == "cpu":
        return
    if device == "pretend":
        from tests import pretend_cuda

        _kept.enter_context(pretend_cuda.pretending())  # until the process ends
        torch.set_default_device("cuda:0")
        return
    place = torch.device("cuda", rank % gpus(device))
    torch.cuda.set_device(place)
    torch.set_default_device(place)


def moved(x: Any) -> Any:
    """Arguments of a rank's function: their tensors on the default device."""
    if isinstance(x, Tensor):
        return x.to(torch.get_default_device())
    if type(x) in (list, tuple):
        return type(x)(moved(item) for item in x)
    if type(x) is dict:
        return {key: moved(value) for key, value in x.items()}
    return x


class _ToHost(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.is_cuda:
            return obj.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def dumps(x: Any) -> bytes:
    """Pickles a rank's result, its tensors as the CPU's: the tests compare there."""
    buffer = io.BytesIO()
    _ToHost(buffer).dump(x)
    return buffer.getvalue()
