"""Which files a model's directory gives to whoever reads it, transformers included."""

from __future__ import annotations

import os
from pathlib import Path

from colrow.files import CONFIG_BYTES, INDEX_BYTES, check_inside

_VOCABULARY_BYTES = 128 << 20
_LIMITS = {
    "config.json": CONFIG_BYTES,
    "generation_config.json": CONFIG_BYTES,
    "adapter_config.json": CONFIG_BYTES,
    "preprocessor_config.json": CONFIG_BYTES,
    "processor_config.json": CONFIG_BYTES,
    "special_tokens_map.json": CONFIG_BYTES,
    "chat_template.json": CONFIG_BYTES,
    "tokenizer_config.json": INDEX_BYTES,
    "added_tokens.json": INDEX_BYTES,
    "model.safetensors.index.json": INDEX_BYTES,
    "tokenizer.json": _VOCABULARY_BYTES,
    "tekken.json": _VOCABULARY_BYTES,
    "vocab.json": _VOCABULARY_BYTES,
    "vocab.txt": _VOCABULARY_BYTES,
    "merges.txt": _VOCABULARY_BYTES,
    "model.safetensors": None,
}
_SUFFIXES = {".jinja": CONFIG_BYTES, ".model": _VOCABULARY_BYTES, ".tiktoken": _VOCABULARY_BYTES}
_TEMPLATES = "additional_chat_templates"


def check_directory(directory: Path, named: str = "") -> None:
    """Makes sure that the files by which a model is read are regular ones of its own directory.

    They are looked at by name, since libraries open them by name; other files are not read.

    Args:
        named: a file in it that the user named, which may be a link to anywhere.

    Raises:
        ValueError: naming a file that leads out of the directory, is no regular file, or is far
            larger than such a file can be.
    """
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        suffix = os.path.splitext(name)[1]
        if name != named and (name in _LIMITS or suffix in _SUFFIXES):
            path = directory / name
            try:
                check_inside(path, directory)
            except FileNotFoundError:
                raise ValueError(f"{path} is a link to a file that is missing") from None
            limit = _LIMITS.get(name, _SUFFIXES.get(suffix))
            if limit is not None and (size := path.stat().st_size) > limit:
                raise ValueError(
                    f"{path} has {size} bytes, more than the {limit} that such a file can need"
                )
    if _TEMPLATES in names and (directory / _TEMPLATES).is_dir():
        for path in (directory / _TEMPLATES).iterdir():
            check_inside(path, directory)
