"""ggml's operations on quantised blocks, called through ctypes.

The package ``libggml-python`` (extra ``quantised``) brings ggml's compiled libraries. Their public
interface is used, and one thing beyond it: that strides and address of a tensor can be set. A
library that lays a tensor out differently counts as missing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
import weakref
from ctypes import c_bool, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PACKAGE = "libggml"
F32, I32 = 0, 26
Memory = Tensor | npt.NDArray[Any]


class GgmlTensor(ctypes.Structure):
    """ggml's tensor up to the address of its numbers."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),  # sizes, the fastest first
        ("nb", c_size_t * 4),  # strides in bytes
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
    )


_TensorPointer = ctypes.POINTER(GgmlTensor)
_ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
_RESULTS: dict[str, Any] = {
    "ggml_init": c_void_p,
    "ggml_free": None,
    "ggml_tensor_overhead": c_size_t,
    "ggml_graph_overhead_custom": c_size_t,
    "ggml_new_graph_custom": c_void_p,
    "ggml_build_forward_expand": None,
    "ggml_get_data": c_void_p,
    "ggml_type_size": c_size_t,
    "ggml_blck_size": c_int64,
    "ggml_get_type_traits": ctypes.POINTER(_TypeTraits),
    "ggml_backend_cpu_init": c_void_p,
    "ggml_backend_cpu_set_n_threads": None,
    "ggml_backend_graph_compute": c_int,
}


class Library:
    """The loaded libraries, and a backend that computes on this thread.

    Raises:
        OSError, AttributeError: they cannot be loaded, or lack a function.
        ValueError: their tensors are laid out differently.
    """

    def __init__(self, directory: Path) -> None:
        # The second needs the first.
        self._loaded = [
            ctypes.CDLL(str(_library_file(directory, name))) for name in ("ggml-base", "ggml-cpu")
        ]
        for name, result in _RESULTS.items():
            self.function(name).restype = result
        self.backend = c_void_p(self.function("ggml_backend_cpu_init")())
        self.function("ggml_backend_cpu_set_n_threads")(self.backend, 1)
        self.compute = self.function("ggml_backend_graph_compute")
        self._check_layout()

    def function(self, name: str) -> Any:
        """One of ggml's functions."""
        for library in self._loaded:
            found = getattr(library, name, None)
            if found is not None:
                return found
        raise AttributeError(f"ggml has no function {name}")

    def _check_layout(self) -> None:
        graph = Graph(self, 1)
        numbers = torch.zeros(3, 5)
        at = graph.tensor(F32, (5, 3), numbers)
        seen = self.function("ggml_get_data")(at)
        if seen != numbers.data_ptr() or list(at.contents.nb) != [4, 20, 60, 60]:
            raise ValueError("ggml's tensors are laid out in a way that is not known here")

    def dequantise(self, kind: int, blocks: npt.NDArray[np.uint8], out: Tensor) -> None:
        """All numbers of some whole blocks into ``out``, which is contiguous and in fp32."""
        if kind == F32:
            out.view(-1).copy_(torch.from_numpy(blocks.reshape(-1).view(np.float32).copy()))
        else:
            self._to_float(kind)(blocks.ctypes.data, out.data_ptr(), out.numel())

    @functools.cache  # noqa: B019  (there is one library)
    def _to_float(self, kind: int) -> Any:
        address = self.function("ggml_get_type_traits")(kind).contents.to_float
        if not address:
            raise ValueError(f"ggml cannot turn its type {kind} into numbers")
        return _ToFloat(address)


class Graph:
    """Operations of ggml that one call computes, in order, on memory that others hold.

    Args:
        tensors: how many there may be at most.
    """

    def __init__(self, library: Library, tensors: int) -> None:
        self._library = library
        size = tensors * library.function("ggml_tensor_overhead")() + library.function(
            "ggml_graph_overhead_custom"
        )(c_size_t(tensors), False)
        self._context = c_void_p(library.function("ggml_init")(_InitParams(size, None, True)))
        weakref.finalize(self, library.function("ggml_free"), self._context)
        make = library.function("ggml_new_graph_custom")
        self._graph = c_void_p(make(self._context, c_size_t(tensors), False))
        self._held: list[Memory] = []
        self._lock = threading.Lock()

    def tensor(self, kind: int, sizes: tuple[int, ...], memory: Memory | None = None) -> Any:
        """A tensor of these sizes, the fastest first, on contiguous memory; None for later."""
        make = self._library.function(f"ggml_new_tensor_{len(sizes)}d")
        make.restype = _TensorPointer
        made = make(self._context, kind, *map(c_int64, sizes))
        if memory is not None:
            self._place(made, memory)
        return made

    def apply(self, name: str, *arguments: Any, out: Memory | None = None) -> Any:
        """The result of ``ggml_NAME``; floats are given as ``c_float``, sizes as ``c_int64``."""
        operation = self._library.function(f"ggml_{name}")
        operation.restype = _TensorPointer
        made = operation(self._context, *arguments)
        if out is not None:
            self._place(made, out)
        self._library.function("ggml_build_forward_expand")(self._graph, made)
        return made

    def compute(self, *places: tuple[Any, int]) -> None:
        """Computes everything.

        Args:
            places: tensors and the addresses where they are this time.
        """
        with self._lock:  # another thread would move them
            for tensor, address in places:
                tensor.contents.data = address
            status = self._library.compute(self._library.backend, self._graph)
        if status:
            raise RuntimeError(f"ggml could not compute: status {status}")

    def _place(self, tensor: Any, memory: Memory) -> None:
        tensor.contents.data = address(memory)
        self._held.append(memory)


def address(memory: Memory) -> int:
    """Where the first number is."""
    return memory.data_ptr() if isinstance(memory, Tensor) else memory.ctypes.data


def _library_file(directory: Path, name: str) -> Path:
    found = sorted(directory.rglob(f"*{name}.*"))
    found = [file for file in found if file.suffix in (".so", ".dylib", ".dll")]
    if not found:
        raise OSError(f"no {name} library in {directory}")
    return found[0]


@functools.cache
def library() -> Library | None:
    """The library, or None where it is not installed or not of a kind that is known here."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    try:
        return Library(Path(found.submodule_search_locations[0]))
    except (OSError, AttributeError, ValueError):
        return None


def installed() -> Library:
    """The library.

    Raises:
        RuntimeError: it is not there.
    """
    found = library()
    if found is None:
        raise RuntimeError(
            "weights that stay quantised need ggml's kernels: pip install 'colrow[quantised]'"
        )
    return found
