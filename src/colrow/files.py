"""Files that somebody else made: what may be opened, how much of it is read, what it may hold.

A model's directory comes from a stranger as often as not. A name in it can lead elsewhere (``../``,
a symbolic link), can be no file at all (a pipe that nobody writes to keeps its reader waiting for
ever), and what it holds can be small on the disk and enormous in memory. Plain Python, no torch.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
import tomllib
from pathlib import Path
from typing import Any

CONFIG_BYTES = 4 << 20
"""The most that is read of a configuration; published ones have some kilobytes."""
SETTINGS_BYTES = 256 << 10
"""The most that is read of a TOML file, which a person writes."""
INDEX_BYTES = 32 << 20
"""The most that is read of an index of tensors; with 140 000 tensors one has 15 MB."""
TEXT_BYTES = 64 << 20
"""The most that is read of a text that is kept in memory as a whole."""

_DEPTH = 100  # of lists and tables in one another
_VALUES = 1_000_000
_DIGITS = 40  # of a whole number: what stands for "no limit" in published files has 31
_STREAMS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def shown(value: object) -> str:
    """A value of a file in a message: as Python writes it, cut to a few words."""
    if isinstance(value, int) and abs(value) > 1 << 100:  # long ones cannot even be written out
        return f"a whole number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def check_regular(path: str | Path) -> None:
    """Makes sure that opening a path opens a file, and not something that waits or has effects.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a directory, a pipe, a socket or a device, or links that go round in a circle.
    """
    try:
        _check_mode(path, os.stat(path).st_mode)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _check_mode(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise ValueError(f"{path} is {kind}, not a regular file, so it is not read")


def check_inside(path: Path, directory: Path) -> None:
    """Makes sure that a path in a directory is a regular file of that directory.

    Symbolic links are followed. A directory of the Hugging Face cache
    (``models--NAME/snapshots/REVISION``) consists of links to ``models--NAME/blobs``, which counts
    as a part of it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a link that leaves the directory, or something that is no regular file.
    """
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(home) for home in _homes(directory)):
        raise ValueError(
            f"{path} leads out of the model's directory, to {real}, so it is not read: if it is "
            "meant to, copy the file into the directory"
        )
    check_regular(path)


def _homes(directory: Path) -> list[Path]:
    """Where the files of a directory may be."""
    real = Path(os.path.realpath(directory))
    homes = [real]
    for parent in real.parents:
        repository = parent.parent
        if parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--")):
            homes.append(repository / "blobs")
    return homes


def member(directory: Path, name: object, named_by: Path) -> Path:
    """The path of a file that another file names, which has to be one of the same directory.

    Args:
        directory: where the file is.
        name: what was read.
        named_by: the file that it was read from, for messages.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no name, one that leads out of the directory, or no regular file.
    """
    parts = name.split("/") if isinstance(name, str) else []
    backwards = os.sep != "/" and isinstance(name, str) and ("\\" in name or ":" in name)
    if not parts or backwards or "\0" in str(name) or any(p in ("", ".", "..") for p in parts):
        raise ValueError(
            f"{named_by} names {shown(name)}, which is not the name of a file in {directory}"
        )
    path = directory / str(name)
    try:
        check_inside(path, directory)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{named_by} names {shown(name)}: {error}") from error
    return path


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: nothing there, or no permission.
        ValueError: no regular file, or a larger one.
    """
    check_regular(path)
    # Should the file have become a pipe since, opening it does not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_mode(path, status.st_mode)
        if status.st_size <= limit:
            content = file.read(limit + 1)
            if len(content) <= limit:
                return content
        raise ValueError(
            f"{path} is larger than {limit} bytes ({status.st_size}), the most that is read of it"
        )


def read_text(path: str | Path, limit: int = TEXT_BYTES) -> str:
    """The content of a regular file of at most ``limit`` bytes as UTF-8.

    Raises:
        OSError: nothing there, or no permission.
        ValueError: no regular file, a larger one, or one that is not UTF-8 (UnicodeDecodeError).
    """
    return read_bytes(path, limit).decode("utf-8")


def read_input(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """What a user names as input: a regular file, or a pipe that the shell opened for this process.

    Raises:
        OSError: nothing there, or no permission.
        ValueError: something else, or more than ``limit`` bytes.
    """
    if not str(path).startswith(_STREAMS):
        return read_bytes(path, limit)
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} gives more than {limit} bytes")
    return content


def read_json(path: str | Path, limit: int = CONFIG_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: nothing there, or no permission.
        ValueError: no regular file, a larger one, or what :func:`parse_json` refuses.
    """
    content = read_bytes(path, limit)
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON that can be read: {error}") from error


def parse_json(text: str, values: int = _VALUES) -> Any:
    """What a JSON text holds, when that is no more than a configuration can need.

    NaN and infinite numbers are passed on: whether one makes sense depends on its key.

    Args:
        values: how many it may hold; lists and tables may be a fifth of them.

    Raises:
        ValueError: not JSON, nested more than 100 deep, the same key twice in a table, whole
            numbers of more than 40 digits, or more values.
    """
    _check_count(text, values)
    try:
        content = json.loads(text, object_pairs_hook=_table, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEPTH} deep") from None
    _check_depth(content)
    return content


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text holds, within the limits of :func:`parse_json`.

    Raises:
        ValueError: not TOML, or more than it can need.
    """
    _check_count(text, _VALUES)
    if _DOTTED.search(text):  # whose reading takes the square of its length
        raise ValueError("it has a key of more than 32 parts")
    if number := _LONG_NUMBER.search(text):
        raise ValueError(f"it has a whole number of {len(number[0])} digits")
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEPTH} deep") from None
    _check_depth(content)
    return content


_DOTTED = re.compile(
    r"""(?<![\w"'-])(?:(?:"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'|[\w-]++)[ \t]*+\.[ \t]*+){33}"""
)
_LONG_NUMBER = re.compile(r"(?<=[=,\[ \t])[+-]?[\d_]{41,}+(?=[,\]} \t\r\n]|$)")


def _check_count(text: str, values: int) -> None:
    if text.count("[") + text.count("{") > values // 5 or text.count(",") > values:
        raise ValueError("it holds more lists, tables or values than such a file can need")


def _check_depth(content: object) -> None:
    level = [content]
    for _ in range(_DEPTH):
        level = [
            item
            for each in level
            if isinstance(each, dict | list)
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEPTH} deep")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"it has the key {shown(key)} twice")
            seen.add(key)
    return table


def _whole_number(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"it has a whole number of {len(text)} digits")
    return int(text)
