"""Tiny random models of transformers' architectures, or saved ones, in one form."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from colrow.checkpoint.opening import open_reader
from colrow.inplace.weights.meta import model_of
from colrow.models.hf_config import read_config
from colrow.tiny_models.overrides import OVERRIDES
from colrow.tiny_models.shrink import tiny_config
from colrow.verification.reference import prepare_reference, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CLASSES = 7

# What is built besides every causal language model: model type and transformers' auto class.
OTHERS = {
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
    "electra": "AutoModelForMaskedLM",
    "albert": "AutoModelForMaskedLM",
    "deberta-v2": "AutoModelForMaskedLM",
    "modernbert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "mt5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    "vit": "AutoModelForImageClassification",
    "clip": "AutoModel",
    "siglip": "AutoModel",
}
_TASKS = {
    "AutoModelForMaskedLM": "masked LM",
    "AutoModelForSeq2SeqLM": "encoder-decoder",
    "AutoModelForSpeechSeq2Seq": "encoder-decoder",
    "AutoModelForImageClassification": "classifier",
    "AutoModel": "two towers",
}
# Architectures that cannot run alone.
NOT_ALONE = {
    "gemma4_assistant": "a draft head: it reads the keys and values of the model it drafts for",
    "gemma4_unified_assistant": "a draft head: it reads the keys and values of the model it "
    "drafts for",
}


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        model_type: transformers' name of it.
        auto_class: the name of the auto class that builds it.
        even: tiny sizes that divide by 2 and 3, instead of awkward ones.
        directory: of a saved model with its own sizes and weights; "" for a tiny random one.
        fields: pairs of a field of the configuration and its value, instead of the tiny ones.
    """

    model_type: str
    auto_class: str = "AutoModelForCausalLM"
    even: bool = False
    directory: str = ""
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The model type, and the task where that is not causal language modelling."""
        return self.model_type if self.is_causal_lm else f"{self.model_type} ({self.task})"

    @property
    def task(self) -> str:
        """In two words what the model is for."""
        return "causal LM" if self.is_causal_lm else _TASKS[self.auto_class]

    @property
    def is_causal_lm(self) -> bool:
        """Whether it continues a text."""
        return self.auto_class == "AutoModelForCausalLM"


def architectures(only: Sequence[str] | None = None, *, even: bool = False) -> list[Architecture]:
    """All of them: every causal LM type of the installed transformers, then ``OTHERS``.

    Args:
        only: model types, or names as :attr:`Architecture.name` gives them.
        even: see :attr:`Architecture.even`.

    Raises:
        ValueError: when a name of ``only`` is none of them.
    """
    with quiet_transformers():
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    every = [Architecture(name, even=even) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    every += [Architecture(name, auto_class, even) for name, auto_class in OTHERS.items()]
    if only is None:
        return every
    unknown = [n for n in only if not any(n in (a.model_type, a.name) for a in every)]
    if unknown:
        names = [a.name for a in every]
        close = list(dict.fromkeys(m for n in unknown for m in get_close_matches(n, names)))
        raise ValueError(
            f"there is no architecture {', '.join(unknown)} here"
            + (f": did you mean {' or '.join(close)}?" if close else ";")
            + " colrow verify --list-architectures shows all names"
        )
    return [a for a in every if a.model_type in only or a.name in only]


def saved_architecture(path: str | Path) -> Architecture:
    """The architecture of a model that transformers saved.

    Raises:
        ValueError: when the directory does not say, or says one whose task is not known here.
    """
    try:
        file, config = read_config(path)
    except FileNotFoundError:
        raise ValueError(
            f"no config.json in {path}: give a directory that transformers saved"
        ) from None
    open_reader(path).close()  # transformers opens what the index names, whatever that is
    model_of(path, None)  # whose numbers are those of the weights
    model_type, names = config.get("model_type"), config.get("architectures") or []
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not isinstance(model_type, str) or not isinstance(names, list) or not named:
        raise ValueError(f"{file} does not name its model_type and architectures")
    with quiet_transformers():
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        for auto_class in ("AutoModelForCausalLM", *_TASKS):
            mapping = getattr(transformers, auto_class)._model_mapping
            if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in mapping:
                continue
            classes = mapping[CONFIG_MAPPING[model_type]]
            classes = classes if isinstance(classes, tuple | list) else [classes]
            if any(cls.__name__ in names for cls in classes):
                return Architecture(model_type, auto_class, directory=str(path))
    raise ValueError(
        f"{file} names the architecture {', '.join(names) or 'of none'} ({model_type}), which is "
        f"none of the tasks that can be compared: causal LM, {', '.join(_TASKS.values())}"
    )


def build(architecture: Architecture, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The whole model, the same at every call, in training mode, without dropout.

    Every parameter of a tiny model is random, also those that transformers starts at 0 or 1
    (biases, norms), since a bias of 0 that is added twice would go unnoticed.

    Raises:
        ValueError: when the architecture cannot run alone.
        ImportError: when it needs a library that is not installed.
    """
    if architecture.model_type in NOT_ALONE:
        raise ValueError(f"cannot run alone: {NOT_ALONE[architecture.model_type]}")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        import transformers

        auto_class = getattr(transformers, architecture.auto_class)
        # The fused kernels for experts know no fp64.
        options = {"dtype": dtype, "experts_implementation": "eager"}
        if architecture.directory:
            model: nn.Module = auto_class.from_pretrained(
                architecture.directory, local_files_only=True, **options
            )
            without_dropout(model)
        else:
            model_class, config = _tiny(architecture, auto_class)
            model = model_class._from_config(config, **options)
            _randomise(model)
        model.to(dtype)
    prepare_reference(model)
    return model.train()


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model; what is compared must not be random."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _tiny(architecture: Architecture, auto_class: Any) -> tuple[Any, PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = architecture.model_type
    config_class = CONFIG_MAPPING[name]
    model_class = auto_class._model_mapping[config_class]
    if isinstance(model_class, tuple | list):
        model_class = model_class[0]
    # The causal LM of a model with several parts may be one part alone.
    part = getattr(model_class, "config_class", config_class)
    if part in config_class.sub_configs.values():
        config_class, name = part, part.model_type
    extra = {"num_labels": CLASSES} if architecture.task == "classifier" else {}
    overrides = OVERRIDES.get(name, {}) | extra | dict(architecture.fields)
    return model_class, tiny_config(config_class, name, overrides, even=architecture.even)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Adds noise to every parameter: a share of 1 to vectors, and what keeps a matrix's scale."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(noise.to(parameter.dtype) * (0.1 if parameter.dim() < 2 else 0.15))
