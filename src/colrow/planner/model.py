"""The model as the planner sees it: a decoder's configuration, and experts where it has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from colrow.models.config import Layout as Division
from colrow.models.config import ModelConfig, num_parameters, parameter_specs


@dataclass(frozen=True)
class Shard:
    """Elements that one tensor-parallel rank holds.

    Attributes:
        embedding: with positions and the norm after it.
        block: of one of ``num_layers`` equal blocks, all experts included.
        head: final norm and, unless tied, the head.
        tied: of the embedding, when the head uses it too; 0 otherwise.
    """

    embedding: int
    block: int
    head: int
    tied: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer, dense or a mixture of experts.

    Attributes:
        name: as shown.
        config: the decoder. With experts, ``config.ffn_size`` is the width of one expert.
        experts: experts per layer; 1 is a dense model.
        active_experts: experts that each token passes through.
        source: where the shape was published.
    """

    name: str
    config: ModelConfig
    experts: int = 1
    active_experts: int = 1
    source: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.active_experts <= self.experts:
            raise ValueError(
                f"{self.active_experts} active of {self.experts} experts: must be between 1 and all"
            )

    @cached_property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return num_parameters(self.config) + self._expert_parameters(self.experts)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token meets: as ``parameters`` with only the active experts."""
        return num_parameters(self.config) + self._expert_parameters(self.active_experts)

    def _expert_parameters(self, count: int) -> int:
        """What experts add to the dense decoder with one expert per layer: the others, a router."""
        if self.experts == 1:
            return 0
        config = self.config
        router = config.hidden_size * self.experts
        return config.num_layers * ((count - 1) * self.mlp_parameters + router)

    @cached_property
    def mlp_parameters(self) -> int:
        """Parameters of one expert, or of a dense block's MLP."""
        config = self.config
        width = 2 if config.gated else 1
        biases = width * config.ffn_size + config.hidden_size if config.mlp_bias else 0
        return (width + 1) * config.hidden_size * config.ffn_size + biases

    def division(self, tp: int, weights: tuple[float, ...] = ()) -> Division:
        """How a tensor-parallel group divides it, see :class:`colrow.models.config.Layout`."""
        return _division(self, tp, weights)

    def shards(self, tp: int, weights: tuple[float, ...] = ()) -> tuple[Shard, ...]:
        """What each tensor-parallel rank holds."""
        return _shards(self, tp, weights)

    @cached_property
    def tensors_per_block(self) -> int:
        """Parameter tensors of one block."""
        one_layer = replace(self.config, num_layers=1, windows=())
        names = parameter_specs(one_layer, self.division(1))
        block = sum(name.startswith("blocks.") for name in names)
        mlp = sum(".mlp." in name for name in names)
        return block if self.experts == 1 else block + (self.experts - 1) * mlp + 1


@lru_cache(maxsize=256)
def _division(model: ModelShape, tp: int, weights: tuple[float, ...]) -> Division:
    return Division.create(model.config, tp, weights)


@lru_cache(maxsize=256)
def _shards(model: ModelShape, tp: int, weights: tuple[float, ...]) -> tuple[Shard, ...]:
    division = _division(model, tp, weights)
    one_layer = replace(model.config, num_layers=1, windows=())
    parts = [{"embedding": 0, "block": 0, "head": 0} for _ in range(tp)]
    for name, spec in parameter_specs(one_layer, division).items():
        head = name.startswith(("norm", "head"))
        part = "block" if name.startswith("blocks.") else "head" if head else "embedding"
        copies = model.experts if ".mlp." in name else 1
        for rank in range(tp):
            parts[rank][part] += copies * math.prod(spec.local_shape(rank))
    router = model.config.hidden_size * model.experts if model.experts > 1 else 0
    hidden = model.config.hidden_size if model.config.tie_embeddings else 0
    return tuple(
        Shard(
            part["embedding"],
            part["block"] + router,
            part["head"],
            division.vocab.size(rank) * hidden,
        )
        for rank, part in enumerate(parts)
    )


# Mixtures of experts are dense decoders of another family, with experts in place of the MLP.
_MOE_FAMILIES = {"mixtral": "mistral", "qwen3_moe": "qwen3"}


def model_from_config_json(path: str | Path) -> ModelShape:
    """The model of a Hugging Face ``config.json``, or of a directory that contains one.

    Raises:
        ValueError: when the file is missing or not such a configuration, or the architecture is
            not supported.
    """
    from colrow.models.hf_config import read_config

    try:
        file, mapping = read_config(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: No such file, or a directory without config.json") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    name = file.parent.name if file.name == "config.json" else file.stem
    try:
        return model_from_mapping(mapping, name=name or "model")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def model_from_mapping(mapping: Mapping[str, object], *, name: str) -> ModelShape:
    """The model of a Hugging Face configuration's keys."""
    from colrow.models.hf_config import config_from_hf

    family = mapping.get("model_type")
    if family not in _MOE_FAMILIES:
        return ModelShape(name, config_from_hf(dict(mapping)), source="config.json")
    dense = {**mapping, "model_type": _MOE_FAMILIES[str(family)]}
    experts = mapping.get("num_local_experts", mapping.get("num_experts"))
    active = mapping.get("num_experts_per_tok")
    if not isinstance(experts, int) or not isinstance(active, int):
        raise ValueError(
            f"{name}: a {family} configuration needs its number of experts, and of "
            "experts per token (num_experts_per_tok)"
        )
    if "moe_intermediate_size" in mapping:
        dense["intermediate_size"] = mapping["moe_intermediate_size"]
    if mapping.get("mlp_only_layers") or mapping.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"{name}: layers without experts among layers with experts are not counted"
        )
    return ModelShape(name, config_from_hf(dense), experts, active, source="config.json")
