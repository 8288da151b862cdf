"""Documents from the files that people have: text, JSON lines, Parquet, saved datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colrow.files import check_regular
from colrow.text import decode

_TEXT, _LINES, _PARQUET = {".txt", ".text", ".md"}, {".jsonl", ".ndjson"}, {".parquet"}
_BLOCK = 1 << 20  # bytes of a text that are tokenised at a time
_NEEDS_EXTRA = "reading {path} needs the package {name}: pip install 'colrow[train]'"


@dataclass(frozen=True)
class Document:
    """A text; ``completion`` alone counts in the loss when ``prompt`` is not empty.

    Attributes:
        prompt: what is given.
        completion: what is learned.
        ends: whether the document ends here; long texts come in several parts.
    """

    completion: str
    prompt: str = ""
    ends: bool = True


def documents(
    path: str | Path, *, progress: Callable[[int], None] | None = None
) -> Iterator[Document]:
    """The documents of a file, or of all files of a directory in the order of their names.

    A text file is one document, as it is but for a byte order mark. A line of a JSON Lines file,
    and a row of a Parquet file or of a dataset saved with ``Dataset.save_to_disk``, has a field
    "text", or "prompt" and "completion".

    Args:
        progress: told the bytes of each file (or part of it) when they have been read.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a format or a row that is not one of these.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if path.is_dir() and (path / "state.json").exists():
        yield from _saved_dataset(path)
        return
    known = _TEXT | _LINES | _PARQUET
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in known and f.is_file())
    if not files:
        raise ValueError(f"directory {path} has no {', '.join(sorted(known))} file")
    for file in files:
        check_regular(file)
        if file.suffix in _LINES:
            yield from _lines(file, progress)
        elif file.suffix in _PARQUET:
            yield from _parquet(file, progress)
        elif file.suffix in _TEXT:
            yield from _text(file, progress)
        else:
            raise ValueError(f"{file} is not one of {', '.join(sorted(known))}")


def size_bytes(path: str | Path) -> int:
    """Bytes of all files there, for a progress bar."""
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def _text(path: Path, progress: Callable[[int], None] | None) -> Iterator[Document]:
    with path.open("rb") as file:
        first, line = 0, 1
        block = b"".join(file.readlines(_BLOCK))
        while block:
            following = b"".join(file.readlines(_BLOCK))
            yield Document(decode(block, str(path), first=first, line=line), ends=not following)
            if progress:
                progress(len(block))
            first, line = first + len(block), line + block.count(b"\n")
            block = following


def _lines(path: Path, progress: Callable[[int], None] | None) -> Iterator[Document]:
    with path.open("rb") as file:
        first = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                text = decode(line, str(path), first=first, line=number)
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
                yield _row(row, f"{path}, line {number}")
            first += len(line)
            if progress:
                progress(len(line))


def _parquet(path: Path, progress: Callable[[int], None] | None) -> Iterator[Document]:
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(_NEEDS_EXTRA.format(path=path, name=error.name)) from error
    with ParquetFile(path) as file:
        wanted = [n for n in ("text", "prompt", "completion") if n in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield _row(row, f"{path}, row {number}")
    if progress:
        progress(path.stat().st_size)


def _saved_dataset(path: Path) -> Iterator[Document]:
    try:
        from datasets import load_from_disk
    except ModuleNotFoundError as error:
        raise ValueError(_NEEDS_EXTRA.format(path=path, name=error.name)) from error
    for number, row in enumerate(load_from_disk(str(path)), 1):
        yield _row(row, f"{path}, row {number}")


def _row(row: Any, where: str) -> Document:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return Document(row["text"])
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return Document(row["completion"], row["prompt"])
    raise ValueError(f'{where} has neither a "text" nor a "prompt" and a "completion"')
