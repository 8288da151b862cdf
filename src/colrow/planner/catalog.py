"""Public model shapes by name, from ``data/models.csv``."""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import cache
from typing import Any

from colrow.layers.describe import ExpertsSpec, LatentAttentionSpec, MLPSpec
from colrow.layers.options import RopeConfig
from colrow.models.families import family_named
from colrow.planner.data import read_table
from colrow.planner.model import ModelShape

ALIASES = {
    "gpt3": "gpt3-175b",
    "gpt-3": "gpt3-175b",
    "bloom": "bloom-176b",
    "gpt-neox": "gpt-neox-20b",
    "mixtral": "mixtral-8x7b",
    "mistral": "mistral-7b",
    "deepseek-r1": "deepseek-v3",
    "kimi": "kimi-k2",
    "gpt-oss": "gpt-oss-120b",
}


def shape_of_sizes(
    name: str,
    family: str,
    *,
    hidden: int,
    layers: int,
    heads: int,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn: int | None = None,
    positions: int = 2048,
    tied: bool | None = None,
    experts: int = 1,
    active_experts: int = 1,
    dropout: float | None = None,
    source: str = "",
    shared_ffn: int = 0,
    dense_layers: int = 0,
    dense_ffn: int = 0,
    latent: tuple[int, ...] = (),
) -> ModelShape:
    """A model of one of the families from its sizes; what is left out is the family's habit.

    Args:
        experts, active_experts: MLPs of a layer, of width ``ffn``, and through how many of them a
            token passes; 1 is a dense model.
        shared_ffn: width of an MLP beside the experts through which every token passes; 0: none.
        dense_layers, dense_ffn: how many of the first layers have one MLP in place of experts, and
            its width.
        latent: ranks of queries and of keys and values, numbers without and with rotation and of a
            value per head, where attention is :class:`LatentAttentionSpec`.

    Raises:
        ValueError: for an unknown family or sizes that do not fit each other.
    """
    known = family_named(family)
    if head_dim is None and (heads < 1 or hidden % heads):
        raise ValueError(
            f"hidden_size={hidden} is not a multiple of num_heads={heads}; give the head "
            "dimension too, or other sizes"
        )
    fields: dict[str, Any] = {**known.fixed, **known.habits}
    share, habit = fields.pop("rotary_share", 1.0), fields.pop("dropout", 0.0)
    probability = habit if dropout is None else dropout
    dims = head_dim or hidden // heads
    if fields["position"] == "rope":
        fields["rope"] = RopeConfig(theta=10000.0, dims=int(dims * share))
    if tied is not None:
        fields["tie_embeddings"] = tied
    fields |= {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads or heads,
        "head_dim": dims,
        "ffn_size": ffn or (round(8 / 3 * hidden) if fields.get("gated", True) else 4 * hidden),
        "max_positions": positions,
        "embedding_dropout": probability,
        "attention_dropout": probability,
        "residual_dropout": probability,
    }
    config = known.compose(fields)
    block = config.blocks[0]
    if latent:
        block = replace(block, attention=LatentAttentionSpec(hidden, heads, *latent))
    dense = usual = block
    if experts > 1 and isinstance(block.mlp, MLPSpec):
        shared = replace(block.mlp, ffn_size=shared_ffn) if shared_ffn else None
        mixture = ExpertsSpec(block.mlp, experts, active_experts, shared)
        usual = replace(block, mlp=mixture)
        dense = replace(block, mlp=replace(block.mlp, ffn_size=dense_ffn or block.mlp.ffn_size))
    blocks = (dense,) * dense_layers + (usual,) * (layers - dense_layers)
    return ModelShape(name, replace(config, blocks=blocks), source)


@cache
def catalog() -> dict[str, ModelShape]:
    """Every built-in model by name."""
    return {
        row["name"]: shape_of_sizes(
            row["name"],
            row["family"],
            hidden=int(row["hidden"]),
            layers=int(row["layers"]),
            heads=int(row["heads"]),
            kv_heads=int(row["kv_heads"]),
            head_dim=int(row["head_dim"]),
            ffn=int(row["ffn"]),
            vocab=int(row["vocab"]),
            positions=int(row["positions"]),
            tied=row["tied"] == "yes",
            experts=int(row["experts"]),
            active_experts=int(row["active"]),
            source=row["source"],
            shared_ffn=int(row["shared_ffn"]),
            dense_layers=int(row["dense_layers"]),
            dense_ffn=int(row["dense_ffn"]),
            latent=tuple(int(n) for n in row["latent"].split("/") if n),
        )
        for row in read_table("models")
    }


def find_model(name: str) -> ModelShape:
    """A built-in model by name; case, punctuation and an owner's prefix do not matter.

    Raises:
        ValueError: when there is none of that name; near matches are suggested.
    """
    wanted = name.rsplit("/", 1)[-1].lower()
    wanted = ALIASES.get(wanted, wanted)
    by_key = {_key(known): known for known in catalog()}
    key = _key(wanted)
    for candidate in (
        key,
        key.removeprefix("meta"),
        key.removesuffix("instruct"),
        key.removesuffix("hf"),
        key.removeprefix("meta").removesuffix("instruct"),
    ):
        if candidate in by_key:
            return catalog()[by_key[candidate]]
    near = difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(by_key[match] for match in near)}?"
    else:
        hint = (
            "a config.json, or --hidden, --layers, --heads and --vocab of 'colrow plan', describe "
            "others."
        )
    raise ValueError(f"unknown model {name!r}: {hint} 'colrow plan --list-models' shows all")


def _key(name: str) -> str:
    return "".join(character for character in name if character.isalnum())
