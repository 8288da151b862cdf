"""Models on the meta device: made from a directory's configuration, and what they lack there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow.checkpoint.locate import resolve_model_path
from colrow.inplace.file_names import FileNames
from colrow.reference import quiet_transformers


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
    if not (directory / "config.json").is_file():
        raise ValueError(f"no config.json in {directory}: give a directory that transformers saved")
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
        with torch.device("meta"):
            model: Any = cls._from_config(config, dtype=dtype or config.dtype or torch.float32)
        if model.can_generate() and (directory / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()  # type: ignore[no-any-return]


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
