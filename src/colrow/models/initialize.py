"""Random initial weights that are the same, whole, however the model is divided."""

from __future__ import annotations

import math

import torch

from colrow import rng
from colrow.comm.agreement import require_same
from colrow.models.decoder import Decoder


@torch.no_grad()
def initialize_(model: Decoder, seed: int) -> None:
    """Weights from N(0, initializer_range^2), norm weights 1, biases 0.

    Each value is a function of the seed, the parameter's name and the position in the whole tensor,
    so every rank draws just what it holds. The ranks compare their seeds, with 16 bytes.

    Raises:
        ValueError: on every rank, when the ranks of a tp or pp group were given different seeds.
    """
    config = model.config
    for group in (model.tp, model.pipeline.pp):
        require_same(
            seed,
            group,
            f"the {group.size} ranks of this {group.name} group were given different seeds for the "
            "initial weights: give all of them the same",
            layer="seed",
            device=next(model.parameters()).device,
        )
    for name, parameter in model.named_parameters():
        spec = model.parameter_specs[name]
        if spec.start in ("zeros", "ones"):
            parameter.fill_(float(spec.start == "ones"))
            continue
        std = config.initializer_range
        if config.scaled_residual_init and spec.start == "residual":
            std /= math.sqrt(2 * config.num_layers)
        key = rng.stream_key(seed, name)
        rng.fill_shard_(
            parameter,
            spec.shard,
            model.tp.rank,
            lambda at, key=key, std=std: rng.normal(key, at) * std,  # type: ignore[misc]
        )
