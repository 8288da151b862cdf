"""From a training run, or any checkpoint that can be read, to a Hugging Face directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colrow.any_model.loading import alone
from colrow.checkpoint.assemble import full_state_dict
from colrow.checkpoint.run_directory import CHECKPOINTS, MODEL_FILES, is_training_run
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.files import check_inside
from colrow.inplace.weights.save import save_pretrained
from colrow.leftovers import part_of
from colrow.models.decoder import Decoder
from colrow.models.hf_config import read_config
from colrow.models.interface import TensorParallelModel


def write_hf_directory(
    model: TensorParallelModel, directory: str | Path, files: str | Path, dtype: torch.dtype
) -> None:
    """Writes what ``AutoModelForCausalLM.from_pretrained`` reads; it appears when it is whole.

    Args:
        model: unsplit.
        directory: to make.
        files: directory with ``config.json`` and the tokenizer's files.
        dtype: of the weights.

    Raises:
        ValueError: when ``directory`` exists already, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import save_torch_state_dict
    except ModuleNotFoundError as error:
        raise ValueError(f"exporting needs {error.name}: pip install 'colrow[models]'") from error
    directory = Path(directory)
    if directory.is_symlink() or (os.path.lexists(directory) and not directory.is_dir()):
        raise ValueError(f"{directory} is a link or no directory: choose another name")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} exists and is not empty: choose another name")
    part = part_of(directory)
    shutil.rmtree(part, ignore_errors=True)
    try:
        _copy_files(Path(files), part)
        if isinstance(model, Decoder):
            config: dict[str, Any] = dict(read_config(part)[1])
            config.pop("torch_dtype", None)
            config["dtype"] = str(dtype).removeprefix("torch.")
            config["tie_word_embeddings"] = model.config.tie_embeddings
            text = json.dumps(config, indent=2) + "\n"
            (part / "config.json").write_text(text, encoding="utf-8")
            whole: Mapping[str, Tensor] = full_state_dict(model)
            tensors = {name: value.to(dtype).contiguous() for name, value in whole.items()}
            save_torch_state_dict(tensors, str(part), metadata={"format": "pt"})
        else:  # transformers knows in which form its models are stored
            save_pretrained(model.module.to(dtype), part)
        if directory.exists():
            directory.rmdir()
        part.rename(directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _copy_files(source: Path, target: Path) -> None:
    """Copies the files of a directory, none of which may come from outside of it."""
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        check_inside(entry, source)
        shutil.copyfile(entry, target / entry.name)


def write_training_run(
    model: TensorParallelModel, directory: str | Path, files: str | Path
) -> None:
    """Writes a run that has taken no step: its weights, without a state of the optimiser.

    Raises:
        ValueError: when ``directory`` is a run already.
    """
    directory = Path(directory)
    if is_training_run(directory):
        raise ValueError(f"{directory} has checkpoints already: choose another name")
    directory.mkdir(parents=True, exist_ok=True)
    _copy_files(Path(files), directory / MODEL_FILES)
    checkpoints = TrainingCheckpoints(directory / CHECKPOINTS, alone())
    empty = torch.optim.SGD(model.module.parameters(), lr=0.0)
    checkpoints.save(0, model.module, empty, {})
    checkpoints.wait()
