"""Tokens in a memory-mapped file: written once, then read at the cost of the bytes read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from colrow.files import check_inside, read_json
from colrow.leftovers import part_of

_META, _IDS, _COUNTED = "tokens.json", "tokens.bin", "counted.bin"


@dataclass(frozen=True)
class Encoded:
    """The tokens of one document.

    Attributes:
        ids: token ids.
        counted: for each token, whether predicting it counts in the loss; None when all do.
    """

    ids: list[int]
    counted: list[bool] | None = None


@dataclass(frozen=True)
class TokenFile:
    """A text as one sequence of tokens, memory-mapped.

    Attributes:
        path: its directory.
        ids: ``[tokens]``, uint16 or uint32.
        counted: ``[tokens]`` bool, whether predicting the token counts; None when all do.
        sha256: of the content; equal files are equal data.
    """

    path: Path
    ids: npt.NDArray[Any]
    counted: npt.NDArray[np.bool_] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def open(cls, path: str | Path) -> TokenFile:
        """Maps a file that :func:`write_tokens` wrote.

        Raises:
            ValueError: not such a file, or not all of it.
        """
        path = Path(path)
        try:
            meta = _checked(read_json(path / _META))
            for name in (_IDS, _COUNTED) if meta["masked"] else (_IDS,):
                check_inside(path / name, path)
            ids = np.memmap(path / _IDS, dtype=np.dtype(meta["dtype"]), mode="r")
            counted = None
            if meta["masked"]:
                counted = np.memmap(path / _COUNTED, dtype=np.bool_, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a token file ({error}); remove it") from error
        if len(ids) != meta["tokens"] or (counted is not None and len(counted) != len(ids)):
            raise ValueError(
                f"{path} is truncated: {len(ids)} of {meta['tokens']} tokens; remove it"
            )
        return cls(path, ids, counted, meta["sha256"])


def _checked(meta: Any) -> dict[str, Any]:
    """What a token file says of itself; numpy takes far more than two types."""
    if not isinstance(meta, dict) or not isinstance(meta["sha256"], str):
        raise ValueError(f"{_META} is not a description of tokens")
    if meta["dtype"] not in ("uint16", "uint32") or not isinstance(meta["tokens"], int):
        raise ValueError(f"{_META} says {meta['tokens']} tokens of type {meta['dtype']}")
    return {**meta, "masked": bool(meta["masked"])}


def write_tokens(path: str | Path, documents: Iterable[Encoded], *, vocab_size: int) -> TokenFile:
    """Writes documents one after the other and publishes the file when it is whole.

    Args:
        path: directory to make; it appears when everything is in it.
        vocab_size: ids are below it; up to 65536 they take two bytes, else four.

    Raises:
        ValueError: an id outside the vocabulary, or no token at all.
    """
    path = Path(path)
    part = part_of(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    digest, total, masked = hashlib.sha256(np.dtype(dtype).name.encode()), 0, False
    try:
        with (part / _IDS).open("wb") as ids_file, (part / _COUNTED).open("wb") as counted_file:
            for document in documents:
                ids = np.asarray(document.ids, dtype=np.int64)
                counted = np.ones(len(ids), dtype=np.bool_)
                if document.counted is not None:
                    counted[:] = document.counted
                if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
                    raise ValueError(
                        f"the tokenizer gave token {ids.max()}, but the model's vocabulary has "
                        f"{vocab_size}: they do not belong together"
                    )
                masked |= not counted.all()
                for file, array in ((ids_file, ids.astype(dtype)), (counted_file, counted)):
                    content = array.tobytes()
                    file.write(content)
                    digest.update(content)
                total += len(ids)
        if not total:
            raise ValueError("the text is empty: there is nothing to train on")
        if not masked:
            (part / _COUNTED).unlink()
        meta = {
            "tokens": total,
            "dtype": np.dtype(dtype).name,
            "masked": masked,
            "sha256": digest.hexdigest(),
        }
        (part / _META).write_text(json.dumps(meta), encoding="utf-8")
        if path.exists():
            shutil.rmtree(part)  # another process was faster
        else:
            part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return TokenFile.open(path)
