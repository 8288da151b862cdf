"""From documents to a token file, once for each text and tokenizer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from colrow.train.documents import Document, documents, size_bytes
from colrow.train.tokens import Encoded, TokenFile, write_tokens

_DOCUMENTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1 << 20
BYTES = "bytes"


class TrainingTokenizer(Protocol):
    """What training needs of a tokenizer."""

    end_token: int | None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without special tokens."""
        ...


class ByteTokenizer:
    """A token for each byte of UTF-8, and 256 for the end: a model from scratch needs no other."""

    end_token: int | None = 256

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The bytes."""
        return [list(text.encode()) for text in texts]


class ModelTokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: see :func:`colrow.generation.tokenizer.load_tokenizer`.
        end_token: what ends a document; by default the tokenizer's own.
    """

    def __init__(self, path: str | Path, end_token: int | None = None) -> None:
        from colrow.generation.tokenizer import load_tokenizer

        tokenizer: Any = load_tokenizer(path)
        self._tokenizer = tokenizer
        self.end_token = tokenizer.eos_token_id if end_token is None else end_token

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text."""
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


def make_tokenizer(name: str, end_token: int | None = None) -> TrainingTokenizer:
    """ "bytes", or the tokenizer of the checkpoint of this name."""
    return ByteTokenizer() if name == BYTES else ModelTokenizer(name, end_token)


def prepare_tokens(
    data: str | Path,
    tokenizer_name: str,
    cache: str | Path,
    *,
    vocab_size: int,
    end_token: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenFile:
    """The tokens of a text, from ``cache`` when they were made before.

    Args:
        data: see :func:`colrow.train.documents.documents`.
        tokenizer_name: "bytes" or a checkpoint.
        cache: directory for token files. A file there is used again when names, sizes and times of
            the text's files are the same.
        vocab_size: of the model.
        end_token: see :class:`ModelTokenizer`.
        progress: told bytes done and in all.

    Raises:
        ValueError: a text that cannot be read, or tokens outside the vocabulary.
    """
    path = token_path(data, tokenizer_name, cache, vocab_size, end_token)
    if path.exists():
        return TokenFile.open(path)
    tokenizer = make_tokenizer(tokenizer_name, end_token)
    total, done = size_bytes(data), 0

    def report(read: int) -> None:
        nonlocal done
        done += read
        if progress:
            progress(done, total)

    encoded = _encoded(documents(data, progress=report), tokenizer)
    return write_tokens(path, encoded, vocab_size=vocab_size)


def token_path(
    data: str | Path,
    tokenizer_name: str,
    cache: str | Path,
    vocab_size: int,
    end_token: int | None = None,
) -> Path:
    """Where :func:`prepare_tokens` puts the tokens of this text."""
    data = Path(data)
    files = sorted(f for f in data.rglob("*") if f.is_file()) if data.is_dir() else [data]
    about = [
        (str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()
    ]
    text = json.dumps([about, tokenizer_name, vocab_size, end_token])
    return Path(cache) / f"{data.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def wait_for_tokens(path: Path, timeout_seconds: float) -> TokenFile:
    """The token file that another rank is making.

    Raises:
        TimeoutError: when it does not appear.
    """
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 did not write {path} within {timeout_seconds:g} seconds")
        time.sleep(0.2)
    return TokenFile.open(path)


def _encoded(found: Iterator[Document], tokenizer: TrainingTokenizer) -> Iterator[Encoded]:
    batch: list[Document] = []
    characters = 0
    for document in found:
        batch.append(document)
        characters += len(document.completion) + len(document.prompt)
        if len(batch) >= _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield from _encode(batch, tokenizer)
            batch, characters = [], 0
    if batch:
        yield from _encode(batch, tokenizer)


def _encode(batch: list[Document], tokenizer: TrainingTokenizer) -> Iterator[Encoded]:
    completions = tokenizer.encode([document.completion for document in batch])
    prompts = tokenizer.encode([document.prompt for document in batch])
    for document, prompt, completion in zip(batch, prompts, completions, strict=True):
        ids = prompt + completion
        if document.ends and tokenizer.end_token is not None:
            ids = [*ids, tokenizer.end_token]
        counted = None
        if document.prompt:
            counted = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        yield Encoded(ids, counted)
