"""Where things are in the directory that ``colrow train`` writes."""

from __future__ import annotations

from pathlib import Path

MODEL_FILES, CHECKPOINTS, SETTINGS = "model", "checkpoints", "settings.toml"


def is_training_run(path: str | Path) -> bool:
    """Whether ``colrow train`` wrote this directory."""
    return (Path(path) / CHECKPOINTS).is_dir()


def model_files(path: str | Path) -> str | Path:
    """Where the configuration and the tokenizer of a model are: for a run in a part of it."""
    return Path(path) / MODEL_FILES if is_training_run(path) else path
