"""Models on the meta device: made from a directory's configuration, and what they lack there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.reader import open_reader
from colrow.files import read_json
from colrow.inplace.file_names import FileNames
from colrow.models.config_limits import check_any_config, number_of_layers
from colrow.models.hf_config import read_config
from colrow.reference import quiet_transformers

_FEW_LAYERS = 200


def is_on_meta(model: nn.Module) -> bool:
    """Whether its parameters are on the meta device.

    Raises:
        ValueError: when some are and some are not.
    """
    places: dict[bool, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(parameter.is_meta, name)
    if len(places) == 2:
        raise ValueError(
            f"{places[True]} of {type(model).__name__} is on the meta device and {places[False]} "
            "is not: put all parameters there, or load all weights first"
        )
    return True in places


def model_of(path: str | Path, dtype: torch.dtype | None) -> nn.Module:
    """The model of a directory that transformers saved, on the meta device, in eval mode.

    Args:
        dtype: by default the one that the configuration names, or fp32.

    Raises:
        ValueError: no directory, no transformers, a configuration that it refuses, an
            architecture that it does not have, or quantised weights.
    """
    directory = resolve_model_path(path)
    if not (directory / "config.json").exists():
        raise ValueError(f"no config.json in {directory}: give a directory that transformers saved")
    file, values = read_config(directory)
    try:
        check_any_config(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    sizes = stored_shapes(directory)
    check_layers(file, values, sizes)
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers is needed: pip install 'colrow[models]'") from error
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # of many classes, for files that are no JSON, or make no sense
            raise ValueError(f"{directory}/config.json: {error}") from error
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{directory} holds quantised weights, which cannot be split in place")
        name = (config.architectures or ["none"])[0]
        cls: Any = getattr(transformers, name, None)
        if cls is None:
            raise ValueError(f"{directory} is a model of class {name}, which transformers lacks")
        try:
            with torch.device("meta"):
                model: Any = cls._from_config(config, dtype=dtype or config.dtype or torch.float32)
        except Exception as error:  # of many classes, for sizes that do not go together
            raise ValueError(f"{file}: transformers cannot make such a model: {error}") from error
        if model.can_generate() and (directory / "generation_config.json").is_file():
            read_json(directory / "generation_config.json")
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    check_shapes(file, model, sizes)
    return model.eval()  # type: ignore[no-any-return]


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a directory's safetensors; none where it has no such files."""
    try:
        reader = open_reader(directory)
    except ValueError:  # whoever loads them will hear of it
        return {}
    with reader:
        return {name: reader.shape(name) for name in reader.names()}


def check_layers(
    file: Path, values: Mapping[str, object], sizes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares the number of layers with the file's, since making thousands takes long.

    A model that uses layers several times has more of them than tensors, though not hundreds.

    Raises:
        ValueError: far more layers than tensors.
    """
    layers = number_of_layers(values)
    if sizes and layers > max(_FEW_LAYERS, len(sizes)):
        raise ValueError(
            f"{file} is of a model with {layers} layers, and its weights have {len(sizes)} tensors:"
            " the file and its configuration do not belong together"
        )


def check_shapes(file: Path, model: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the tensors that a model and a file call the same.

    Raises:
        ValueError: naming one of another size.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, shape in sizes.items():
        if name in own and math.prod(own[name]) != math.prod(shape):
            raise ValueError(
                f"{name} has shape {shape} in the weights beside {file}, but the configuration "
                f"asks for {tuple(own[name])}"
            )


def give_buffers(model: nn.Module, found: FileNames | None, device: torch.device) -> None:
    """Buffers on the meta device get their values: from the files, or from the model's own code.

    Raises:
        ValueError: naming a buffer, or a tensor that is neither parameter nor buffer, without one.
    """
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
            continue
        source = found.sources.get(name) if found is not None else None
        value = torch.empty_like(buffer, device=device)
        if source is not None:
            whole = [((0, length),) for length in source.shape]
            value.copy_(source.read(whole, buffer.dtype))
            value._is_hf_initialized = True  # type: ignore[attr-defined]
        elif not hasattr(model, "initialize_weights"):
            raise ValueError(
                f"the buffer {name} of {type(model).__name__} is on the meta device, and "
                + ("its weights do not hold it" if found is not None else "no weights are given")
                + ": compute it on the CPU when the model is built"
            )
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = value
    if hasattr(model, "initialize_weights"):
        initialize: Any = model.initialize_weights
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        initialize()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"{path}.{name} is a tensor on the meta device, and neither a parameter nor a "
                    "buffer: build the model with it on the CPU"
                )
