"""Public model shapes by name, from ``data/models.csv``."""

from __future__ import annotations

import difflib
from functools import cache

from colrow.layers.options import RopeConfig
from colrow.models.config import ModelConfig
from colrow.planner.data import read_table
from colrow.planner.model import LatentAttention, ModelShape

# What a family's models have in common, beyond their sizes.
_GPT = {"norm": "layernorm", "gated": False, "qkv_bias": True, "output_bias": True}
_FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {**_GPT, "mlp_bias": True, "activation": "gelu_tanh", "position": "learned"},
    "gpt_neox": {**_GPT, "mlp_bias": True, "activation": "gelu", "parallel_residual": True},
    "bloom": {
        **_GPT,
        "mlp_bias": True,
        "activation": "gelu_bloom",
        "position": "alibi",
        "embedding_norm": True,
    },
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
_ROTARY_SHARE = {"gpt_neox": 0.25}
_DROPOUT = {"gpt2": 0.1}
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


def decoder(
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
    latent: LatentAttention | None = None,
) -> ModelShape:
    """A model of one of the families from its sizes; what is left out is the family's habit.

    Raises:
        ValueError: for an unknown family or sizes that do not fit each other.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown model family {family!r}: one of {', '.join(_FAMILIES)}")
    if head_dim is None and (heads < 1 or hidden % heads):
        raise ValueError(
            f"hidden_size={hidden} is not a multiple of num_heads={heads}; give the head "
            "dimension too, or other sizes"
        )
    dims = head_dim or hidden // heads
    style = _FAMILIES[family]
    gated = bool(style.get("gated", True))
    rotary = int(dims * _ROTARY_SHARE.get(family, 1.0))
    probability = _DROPOUT.get(family, 0.0) if dropout is None else dropout
    config = ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=dims,
        ffn_size=ffn or (round(8 / 3 * hidden) if gated else 4 * hidden),
        max_positions=positions,
        rope=None if "position" in style else RopeConfig(theta=10000.0, dims=rotary),
        tie_embeddings=(not gated and family != "gpt_neox") if tied is None else tied,
        embedding_dropout=probability,
        attention_dropout=probability,
        residual_dropout=probability,
        **style,  # type: ignore[arg-type]
    )
    return ModelShape(
        name,
        config,
        experts,
        active_experts,
        source,
        shared_ffn=shared_ffn,
        dense_layers=dense_layers,
        dense_ffn=dense_ffn,
        latent=latent,
    )


def _latent(text: str) -> LatentAttention | None:
    """Latent attention from "query rank/kv rank/nope/rope/value"; None from an empty text."""
    return LatentAttention(*(int(part) for part in text.split("/"))) if text else None


@cache
def catalog() -> dict[str, ModelShape]:
    """Every built-in model by name."""
    return {
        row["name"]: decoder(
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
            latent=_latent(row["latent"]),
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
