"""A number that stands for a value: equal for equal values, whatever process holds them."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from colrow import rng

Known = MutableMapping[int, Tensor]
"""Tensors of which only their presence counts, by id."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, enum.Enum)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements hashed at a time on a GPU, as 8 bytes each
_DEEPEST = 16


def digest_of(value: Any, known: Known) -> int | Tensor:
    """A hash of 63 bits; of tensors by their dtype, shape and bits, wherever they lie.

    Containers, dataclasses and NumPy arrays are looked into; of any other object its class counts.

    Returns:
        A 0-d int64 tensor where a tensor of a GPU is in the value, since reading that would wait.
    """
    hashed, later = hashlib.blake2b(digest_size=8), list[Tensor]()
    _add(value, known, hashed, later, 0)
    number = int.from_bytes(hashed.digest(), "little") >> 1
    return combined([number, *later])


def combined(digests: list[int | Tensor]) -> int | Tensor:
    """One for several, in their order."""
    numbers = [d for d in digests if not isinstance(d, Tensor)]
    total: int | Tensor = rng.stream_key(0, *numbers)
    for place, digest in enumerate(d for d in digests if isinstance(d, Tensor)):
        total = rng.bits(rng.stream_key(1, place), digest) + total
    return total


def _add(value: Any, known: Known, hashed: Any, later: list[Tensor], depth: int) -> None:
    if isinstance(value, _PLAIN):
        hashed.update(f"{type(value).__name__} {value!r};".encode(errors="replace"))
        return
    hashed.update(f"{type(value).__name__} (".encode())
    parts: list[Any] = []
    if isinstance(value, Tensor):
        if known.get(id(value)) is not value:
            _add_tensor(value, hashed, later)
    elif isinstance(value, np.ndarray | np.generic):
        hashed.update(f"{value.dtype} {value.shape} ".encode())
        hashed.update(b"" if value.dtype.hasobject else value.tobytes())
    elif isinstance(value, Mapping):
        parts = sorted(value.items(), key=lambda pair: str(pair[0]))
    elif isinstance(value, set | frozenset):
        parts = sorted(value, key=str)
    elif isinstance(value, list | tuple | range):
        parts = list(value)
    elif dataclasses.is_dataclass(value):
        parts = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    if depth < _DEEPEST:
        for part in parts:
            _add(part, known, hashed, later, depth + 1)
    hashed.update(b");")


def _add_tensor(tensor: Tensor, hashed: Any, later: list[Tensor]) -> None:
    tensor = tensor.detach()
    if tensor.is_nested:
        for part in tensor.unbind():
            _add_tensor(part, hashed, later)
        return
    hashed.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        return
    if tensor.is_meta or not tensor.numel():
        return
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.reshape(-1).contiguous()
    if flat.is_cpu:
        hashed.update(flat.view(torch.uint8).numpy())
        return
    flat, total = flat.view(_INTEGERS[flat.element_size()]), None
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].long()
        place = torch.arange(start, start + part.numel(), device=part.device)
        found = rng.bits(rng.bits(0, place), part).sum()
        total = found if total is None else total + found
    assert total is not None
    later.append(total)
