"""The index of a training checkpoint: as it is written, and read as what a stranger may have made.

It is JSON, with the sizes and checksums of the files beside it and its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from colrow.files import member, parse_json, read_bytes, shown

INDEX = "index.json"
_FORMAT = "colrow training checkpoint 1"
_REMEDY = "Remove this checkpoint's directory to continue from the one before it"
_BYTES, _VALUES = 256 << 20, 20_000_000  # a box of a tensor takes about ten values


def index_text(state: dict[str, Any], files: dict[str, Any], tensors: dict[str, Any]) -> str:
    """The text of an index.

    Args:
        state: what else belongs to the checkpoint: the optimiser's numbers, the caller's state.
        files: by name, their bytes and checksums.
        tensors: by name, their dtypes, shapes and boxes.
    """
    content = {"format": _FORMAT, "state": state, "files": files, "tensors": tensors}
    return json.dumps({**content, "sha256": _digest(content)})


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a checkpoint, which says what :func:`index_text` would, whoever wrote it.

    It fits its own checksum; every name in it is that of a file in the directory, every file that
    holds a box of a tensor is among those whose checksums are given, and every box lies in its
    tensor.

    Raises:
        ValueError: no checkpoint there, or one that was altered after it was written.
    """
    content, path = _parsed(directory), directory / INDEX
    digest = content.pop("sha256", None)
    if digest != _digest(content):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content. {_REMEDY}")
    try:
        _check(content)
    except _WrongError as error:
        raise ValueError(f"{path} is damaged: {error}. {_REMEDY}") from None
    return content


def check_files(directory: Path, files: dict[str, Any], names: list[str]) -> None:
    """Compares these files with the sizes and checksums of the index.

    Raises:
        ValueError: a missing, truncated or altered file.
    """
    for name in names:
        expected = files[name]
        try:
            path = member(directory, name, directory / INDEX)
        except FileNotFoundError:
            raise ValueError(f"{directory / name} is missing. {_REMEDY}") from None
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"{path} is truncated or was appended to: {path.stat().st_size} bytes instead of "
                f"{expected['bytes']}. {_REMEDY}"
            )
        if sha256(path) != expected["sha256"]:
            raise ValueError(f"{path} is damaged: its checksum does not fit. {_REMEDY}")


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(directory: Path) -> dict[str, Any]:
    """What the index of a checkpoint says, compared with nothing yet.

    Raises:
        ValueError: no checkpoint there, or one that another program wrote.
    """
    path = directory / INDEX
    try:
        text = read_bytes(path, _BYTES).decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{directory} is not a training checkpoint: it has no {INDEX}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not text ({error}). {_REMEDY}") from None
    try:
        content = parse_json(text, values=_VALUES)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}). {_REMEDY}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not the index of a training checkpoint of this version")
    return content


class _WrongError(Exception):
    """What is wrong with an index."""


def _check(index: dict[str, Any]) -> None:
    files, tensors, state = (_table(index, key) for key in ("files", "tensors", "state"))
    for name, file in files.items():
        if not name or "\0" in name or Path(name).name != name or name in (".", ".."):
            raise _WrongError(f"it names {shown(name)}, outside the checkpoint")
        if not _sizes([_table(files, name).get("bytes")]) or not isinstance(
            file.get("sha256"), str
        ):
            raise _WrongError(f"it has no size and checksum of {shown(name)}")
    for name, tensor in tensors.items():
        dtype, shape = _table(tensors, name).get("dtype"), tensor.get("shape")
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise _WrongError(f"the tensor {shown(name)} has the dtype {shown(dtype)}")
        if not _sizes(shape) or not isinstance(tensor.get("chunks"), list):
            raise _WrongError(f"the tensor {shown(name)} has no shape and boxes")
        for chunk in tensor["chunks"]:
            _check_chunk(chunk, name, shape, files)
    _table(state, "user")
    for name, numbers in _table(state, "optimizer").items():
        if not isinstance(numbers, dict):
            raise _WrongError(f"the optimiser's state of {shown(name)} is not a table")


def _check_chunk(chunk: Any, name: str, shape: list[int], files: dict[str, Any]) -> None:
    if not isinstance(chunk, dict) or not isinstance(chunk.get("key"), str):
        raise _WrongError(f"a box of {shown(name)} is not described")
    if not isinstance(chunk.get("file"), str) or chunk["file"] not in files:
        raise _WrongError(
            f"a box of {shown(name)} is in {shown(chunk.get('file'))}, which has no checksum"
        )
    offsets: Any = chunk.get("offsets")
    sizes: Any = chunk.get("sizes")
    fits = _sizes(offsets) and _sizes(sizes) and len(offsets) == len(sizes) == len(shape)
    if not fits or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise _WrongError(f"a box of {shown(name)} lies outside the tensor")


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key)
    if not isinstance(value, dict):
        raise _WrongError(f"{shown(key)} is not a table")
    return value


def _sizes(value: Any) -> bool:
    """Whether it is a list of lengths whose product a tensor can have."""
    if not isinstance(value, list) or len(value) > 64:
        return False
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    return numbers and math.prod(value) < 1 << 63


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
