"""CUDA without a GPU: tensors on the CPU that say they are on cuda:0 and mix with no others.

``pytest --device pretend`` runs the ranks' code so. Numbers are the CPU's; what it finds are
tensors on the wrong device, and mistakes in branches that only a GPU takes. What it cannot show:
CUDA kernels, streams, events, asynchronous errors, C++ code that asks for a tensor's device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# They take tensors of two devices.
_TRANSFERS = ("aten::copy_", "aten::_to_copy")


class PretendTensor(Tensor):
    """A CPU tensor behind a claim."""

    held: Tensor
    device = GPU  # type: ignore[assignment]
    is_cuda, is_cpu = True, False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        x: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=held.device,
        )
        x.held = held
        return x

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class PretendCuda(TorchDispatchMode):
    """While it is on, tensors that are made on CUDA are :class:`PretendTensor`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def start() -> None:
    """For the rest of this process; ``torch.cuda`` then says that there is one GPU."""
    PretendCuda().__enter__()
    torch.cuda._lazy_init = lambda: None  # type: ignore[attr-defined]
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    # These two look for the device in C++ before any dispatch.
    torch.tensor = _on_device(torch.tensor)
    torch.as_tensor = _on_device(torch.as_tensor)


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


def _on_device(make: Any) -> Any:
    def made(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        place = torch.get_default_device() if device is None else torch.device(device)
        if isinstance(data, PretendTensor) and device is None:
            place = GPU
        gradient = options.pop("requires_grad", False)
        x: Tensor = make(data, dtype=dtype, device="cpu", **options)
        return x.to(place).requires_grad_(gradient)

    return made


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _held(x: Any) -> Any:
    return x.held if isinstance(x, PretendTensor) else x


def _claimed(x: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, PretendTensor):
        return x
    return PretendTensor(x.resolve_conj().resolve_neg())  # the claim would hide these two flags


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, asked = func._schema.name, kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    here = any(isinstance(t, PretendTensor) for t in tensors)
    if not here and not _is_gpu(asked):
        return func(*args, **kwargs)
    _check(name, tensors, here, kwargs.get("generator"))
    if _is_gpu(asked):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    host_args, host_kwargs = tree_map(_held, (args, kwargs))
    result = func(*host_args, **host_kwargs)
    if name.startswith("c10d::"):  # (tensors, work), or the work alone
        return (args[0], *result[1:]) if isinstance(result, tuple) else result
    if name == "aten::_to_copy" and asked is not None and not _is_gpu(asked):
        return result
    if name == "aten::copy_":
        return args[0]
    result = tree_map(_claimed, result)
    if any(argument.alias_info is not None for argument in func._schema.arguments):
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def _check(name: str, tensors: list[Tensor], here: bool, generator: Any) -> None:
    """As CUDA would raise."""
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    on_cpu = any(not isinstance(t, PretendTensor) and t.dim() for t in tensors)
    if here and on_cpu and name not in _TRANSFERS:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu"
        )
