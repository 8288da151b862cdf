"""CUDA without a GPU: tensors on the CPU that say they are on cuda:0 and mix with no others.

``pytest --device pretend`` runs the ranks' code so. Numbers are the CPU's; what it finds are
tensors on the wrong device, and mistakes in branches that only a GPU takes. What it cannot show:
CUDA kernels, streams, events, asynchronous errors, C++ code that asks for a tensor's device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# They take tensors of two devices; an index may be the CPU's.
_TRANSFERS = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_")
_leaving = False
# Operations for which the host waited for the device, or that moved data between the two.
waits: list[str] = []


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
        waits.append("aten::_local_scalar_dense")
        return self.held.tolist()

    def cpu(self, *args: Any, **options: Any) -> Tensor:
        return self.to("cpu")

    def to(self, *args: Any, **options: Any) -> Tensor:  # type: ignore[override]
        """Says which of C++'s conversions "to the CPU" are not just ones of dtype."""
        global _leaving
        target = [*args, options.get("device"), getattr(options.get("other"), "device", None)]
        places = [x.device if isinstance(x, Tensor) else x for x in target]
        _leaving = any(isinstance(x, str | torch.device) and not _is_gpu(x) for x in places)
        try:
            x = super().to(*args, **options)
            # To C++ it is on the CPU already.
            left: Tensor = torch.ops.aten._to_copy.default(x) if _leaving and x.is_cuda else x
            return left
        finally:
            _leaving = False

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


@contextmanager
def pretending() -> Iterator[None]:
    """``torch.cuda`` says that there is one GPU, and tensors that are made there pretend."""
    patches: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: None,
        "Event": _Event,
    }
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        # These two look for the device in C++ before any dispatch.
        for make in (torch.tensor, torch.as_tensor):
            stack.enter_context(patch.object(torch, make.__name__, _on_device(make)))
        # A wrapped tensor's views cannot be inference tensors.
        stack.enter_context(patch.object(torch.inference_mode, "__enter__", _without_gradient))
        stack.enter_context(patch.object(torch.inference_mode, "__exit__", _as_before))
        waits.clear()
        with PretendCuda():
            yield


def _without_gradient(mode: Any) -> None:
    mode.before = torch.is_grad_enabled()
    torch.set_grad_enabled(mode.before and not mode.mode)


def _as_before(mode: Any, *_: object) -> None:
    torch.set_grad_enabled(mode.before)


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 1.0


def _on_device(make: Any) -> Any:
    def made(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        place = torch.empty(0).device if device is None else torch.device(device)
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
    if _waits(name, tensors, here, asked):
        waits.append(name)
    if name == "aten::_assert_async" and len(args) > 1 and len(args[1].encode()) >= 255:
        raise RuntimeError("Message length must be smaller than 255")
    if name in ("c10d::send", "c10d::recv_"):
        raise RuntimeError("Gloo sends from the host's memory, and this is a GPU's")
    if _is_gpu(asked):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    host_args, host_kwargs = tree_map(_held, (args, kwargs))
    result = func(*host_args, **host_kwargs)
    if name.startswith("c10d::"):  # (tensors, work), or the work alone
        return (args[0], *result[1:]) if isinstance(result, tuple) else result
    if name == "aten::_to_copy" and _leaving:
        return result
    if name == "aten::copy_":
        return args[0]
    result = tree_map(_claimed, result)
    if any(argument.alias_info is not None for argument in func._schema.arguments):
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def _waits(name: str, tensors: list[Tensor], here: bool, asked: Any) -> bool:
    if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::item"):
        return True
    if name == "aten::_to_copy":
        return _leaving if here else _is_gpu(asked)
    return name == "aten::copy_" and len({isinstance(t, PretendTensor) for t in tensors}) > 1


def _check(name: str, tensors: list[Tensor], here: bool, generator: Any) -> None:
    """As CUDA would raise."""
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    on_cpu = any(not isinstance(t, PretendTensor) and t.dim() for t in tensors)
    if here and on_cpu and name not in _TRANSFERS:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu"
        )
