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

from colrow.any_model.loading import known_to_decoder, load_model, split_in_place
from colrow.checkpoint.assemble import full_state_dict
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.files import check_inside
from colrow.inplace.weights.load import allocate
from colrow.inplace.weights.meta import give_buffers, model_of
from colrow.inplace.weights.save import save_pretrained
from colrow.leftovers import part_of
from colrow.models.build import from_config
from colrow.models.decoder import Decoder
from colrow.models.hf_config import config_from_file, read_config
from colrow.models.interface import TensorParallelModel

MODEL_FILES, CHECKPOINTS = "model", "checkpoints"
_OF_DECODER = "embedding.weight"  # no model of transformers with a head has it outside of a part


def alone() -> Mesh:
    """A grid of this process."""
    single = ParallelGroup.single
    return Mesh(single("tp"), single("dp"), single("pp"), None, torch.device("cpu"))


def is_training_run(path: str | Path) -> bool:
    """Whether ``colrow train`` wrote this directory."""
    return (Path(path) / CHECKPOINTS).is_dir()


def load_trained(run: str | Path, step: int | None = None) -> tuple[TensorParallelModel, int]:
    """The whole model of a training run, on the CPU in the dtype of its parameters, and its step.

    Args:
        run: the ``--output`` of ``colrow train``.
        step: of the checkpoint; by default the newest.

    Raises:
        ValueError: no such run or checkpoint, or a damaged one.
    """
    run = Path(run)
    checkpoints = TrainingCheckpoints(run / CHECKPOINTS, alone())
    found = checkpoints.steps()
    if not found:
        raise ValueError(f"{run} has no checkpoints: give the --output of colrow train")
    step = found[-1] if step is None else step
    if step not in found:
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {found}")
    dtype, files = checkpoints.dtype(step), run / MODEL_FILES
    model: TensorParallelModel
    if known_to_decoder(files) and _OF_DECODER in checkpoints.parameters(step):
        config = config_from_file(files)
        checkpoints.check_shapes(step, config)
        model = from_config(config, alone(), dtype=dtype)
    else:
        module = model_of(files, dtype)
        give_buffers(module, None, torch.device("cpu"))
        allocate(module, lambda _, like: torch.empty_like(like, device="cpu"))
        model = split_in_place(module, alone())
        names = {name for name, _ in module.named_parameters()}
        if names != checkpoints.parameters(step):
            other = sorted(names ^ checkpoints.parameters(step))
            raise ValueError(
                f"{', '.join(other[:3])} of {checkpoints.path(step)} and of the run's "
                "configuration differ: they do not belong together"
            )
    checkpoints.load(step, model.module, None)
    model.module.eval()
    return model, step


def load_any(path: str | Path, step: int | None = None) -> TensorParallelModel:
    """The whole model of a training run, a Hugging Face directory or a GGUF file."""
    if is_training_run(path):
        return load_trained(path, step)[0]
    return load_model(path, alone())


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
