"""Models on the meta device: made from a directory's configuration, and given their buffers."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.opening import open_reader
from colrow.files import read_json, shown
from colrow.inplace.weights.file_names import FileNames
from colrow.models.config_limits import check_any_config, number_of_layers
from colrow.models.hf_config import read_config
from colrow.verification.reference import quiet_transformers

_FEW_LAYERS = 200
_PARAMETERS = 250_000
"""Of a model without a file; published ones with an expert a module have some ten thousand."""


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


def transformers_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' configuration of a directory that it saved, or of a ``config.json``.

    Raises:
        ValueError: no configuration there, no transformers, one that it refuses, or quantised
            weights.
    """
    file = directory if directory.suffix == ".json" else directory / "config.json"
    if not file.exists():
        raise ValueError(f"no config.json in {directory}: give a directory that transformers saved")
    file, values = read_config(directory)
    try:
        check_any_config(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    try:
        import transformers
    except ImportError as error:
        raise ValueError("transformers is needed: pip install 'colrow[models]'") from error
    if "auto_map" in values and not trust_remote_code and not _is_known(values):
        raise ValueError(
            f"{directory} comes with code of its own, for an architecture that transformers lacks; "
            "trust_remote_code (--trust-remote-code) runs it, and it can do anything that you can"
        )
    check_layers(file, values, stored_shapes(directory))
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(
                directory, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # of many classes, for files that are no JSON, or make no sense
            raise ValueError(f"{file}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{directory} holds quantised weights, which cannot be split in place")
    return config


def _is_known(values: Mapping[str, object]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return values.get("model_type") in CONFIG_MAPPING_NAMES


def model_of(
    path: str | Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a directory that transformers saved, on the meta device, in eval mode.

    Args:
        dtype: by default the one that the configuration names, or fp32.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: no directory, no transformers, a configuration that it refuses, an
            architecture that it does not have, or quantised weights.
    """
    directory = resolve_model_path(path)
    config = transformers_config(directory, trust_remote_code=trust_remote_code)
    file, sizes = directory / "config.json", stored_shapes(directory)
    import transformers

    with quiet_transformers():
        cls = _class_of(directory, config, trust_remote_code=trust_remote_code)
        try:
            with torch.device("meta"), few_parameters(len(sizes)):
                model: Any = cls._from_config(config, dtype=dtype or config.dtype or torch.float32)
        except Exception as error:  # of many classes, for sizes that do not go together
            raise ValueError(f"{file}: transformers cannot make such a model: {error}") from error
        if model.can_generate() and (directory / "generation_config.json").is_file():
            generation = directory / "generation_config.json"
            if not isinstance(read_json(generation), dict):
                raise ValueError(f"{generation} is not a generation configuration")
            try:
                model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
            except Exception as error:  # of many classes, for values that make no sense
                raise ValueError(f"{generation}: {error}") from error
    check_shapes(file, model, sizes)
    _alike(model, dtype)
    return model.eval()  # type: ignore[no-any-return]


def _alike(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Some parameters are made on the CPU, and some in fp32 although fp64 is asked for."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            wide = dtype == torch.float64 and parameter.dtype == torch.float32
            if wide or not parameter.is_meta:
                moved = parameter.detach().to("meta", dtype if wide else parameter.dtype)
                other = nn.Parameter(moved, parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), other)


def random_model(path: str | Path, dtype: torch.dtype, seed: int) -> nn.Module:
    """transformers' model of a configuration with the random weights of a seed, on the CPU.

    Raises:
        ValueError: as for :func:`model_of`.
    """
    file = resolve_model_path(path)
    config = transformers_config(file)
    with quiet_transformers(), torch.random.fork_rng(devices=[]), few_parameters(0):
        torch.manual_seed(seed)
        cls = _class_of(file, config, trust_remote_code=False)
        try:
            model: nn.Module = cls._from_config(config, dtype=dtype)
        except Exception as error:  # of many classes, for sizes that do not go together
            raise ValueError(f"{file}: transformers cannot make such a model: {error}") from error
    return model.eval()


def _class_of(directory: Path, config: Any, *, trust_remote_code: bool) -> Any:
    """The class of transformers that a configuration names, or of the code beside it."""
    import transformers

    code = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(code["AutoModelForCausalLM"], directory)
    architectures = config.architectures
    if architectures is None:
        causal = transformers.AutoModelForCausalLM._model_mapping
        if type(config) in causal:
            known = causal[type(config)]
            return known[0] if isinstance(known, tuple | list) else known
    names = architectures if isinstance(architectures, list) and architectures else ["none"]
    found = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f"{directory} is a model of class {shown(names[0])}, which transformers lacks"
            + ("; trust_remote_code runs the code that comes with it" if code else "")
        )
    return found


@contextlib.contextmanager
def few_parameters(stored: int) -> Iterator[None]:
    """Stops the making of a model that has far more parameters than its file has tensors.

    Any number of a configuration can be one of modules (experts, codebooks, labels), and each takes
    time and memory even on the meta device. A file may hold several parameters in one tensor, or
    none of the model at all.

    Args:
        stored: how many tensors the file has; 0 where there is no file.
    """
    most, made = (16 * stored + 10_000 if stored else _PARAMETERS), 0
    maker = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += parameter is not None and threading.get_ident() == maker
        if made > most:
            raise ValueError(
                f"it would have more than {most} parameters"
                + (f", and its weights are {stored} tensors" if stored else "")
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


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
