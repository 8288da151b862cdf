"""What a tokenizer may do to a text and to the memory, before it is let loose on either."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path
from typing import Any

from colrow.files import shown

_CONTAINERS = 2_500_000  # a vocabulary of a million pieces, each with its score, has as many lists
_GROWTH = 1_000
_DIGITS = 7  # of the number of a token; the largest vocabularies have a million
_NUMBERED = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")
_BLOCK = 1 << 20


def check_vocabulary(path: Path) -> None:
    """Makes sure that reading a tokenizer.json does not make millions of lists.

    Raises:
        ValueError: when it would.
    """
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found += block.count(b"[") + block.count(b"{")
            if found > _CONTAINERS:
                raise ValueError(f"{path} holds more lists and tables than a tokenizer can need")


def check_numbers(tokenizer: Any, directory: Path) -> None:
    """Makes sure that the tokens of a vocabulary have numbers that tokens have.

    A tokenizer that is sent to other processes lists every number up to the largest.

    Raises:
        ValueError: when the largest is beyond every model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Asking for the numbers takes longer than looking for a long one in the files.
    if backend is None or not any(_has_long_number(directory / name) for name in _NUMBERED):
        return
    vocabulary = backend.get_vocab(with_added_tokens=True)
    token = max(vocabulary, key=lambda token: vocabulary[token], default="")
    if vocabulary and vocabulary[token] >= 10**_DIGITS:
        raise ValueError(
            f"the tokenizer of {directory} gives {shown(token)} the number {vocabulary[token]}, "
            "more than a vocabulary can have tokens"
        )


def _has_long_number(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return re.search(rb"\d{%d}" % (_DIGITS + 1), content) is not None


def check_growth(tokenizer: Any, path: Path) -> None:
    """Makes sure that normalising or decoding a text does not make it a thousand times longer.

    A few replacements in a row, of a letter by thirty, fill any memory.

    Raises:
        ValueError: when it could.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for name in ("normalizer", "decoder"):
        part = getattr(backend, name, None)
        if part is None:
            continue
        growth = _growth(json.loads(part.__getstate__()))
        if growth > _GROWTH:
            raise ValueError(
                f"the {name} of the tokenizer of {path} can make a text {growth:.0e} times longer"
            )


def _growth(step: Any) -> float:
    """How many characters can come of one."""
    if isinstance(step, list):
        growth = 1.0
        for each in step:
            growth = min(growth * _growth(each), 1e30)
        return growth
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") in ("Replace", "Prepend"):
        content, pattern = step.get("content", step.get("prepend", "")), step.get("pattern")
        known = pattern.get("String") if isinstance(pattern, dict) else None
        if not isinstance(content, str):
            raise ValueError(f"the tokenizer puts {shown(content)} into a text")
        if step["type"] == "Prepend":
            return max(1.0, len(content) / 16)
        # A pattern that matches nothing at all puts its content between all characters.
        return max(1.0, len(content) / len(known)) if known else 1.0 + len(content)
    inner = [value for value in step.values() if isinstance(value, list | dict)]
    return _growth(inner)
