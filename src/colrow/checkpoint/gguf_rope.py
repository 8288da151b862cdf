"""Rotary positions as a GGUF file says them: in its metadata, and as tensors of factors."""

from __future__ import annotations

from typing import Any

import torch

from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.layers.options import RopeConfig
from colrow.layers.position import rope_frequencies
from colrow.models.hf_rope import yarn_magnitude

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
EVERYWHERE = "rope_freqs.weight"
FACTORS = frozenset({LONG, SHORT, EVERYWHERE})
"""Tensors of what each frequency is divided by: part of the configuration, not weights."""
_LLAMA_31 = (8.0, 32.0)  # factors of Llama 3.1 and 3.2


def rope_from_gguf(
    reader: GGUFTensorReader, architecture: str, dims: int, *, interleaved: bool
) -> RopeConfig:
    """What llama.cpp makes of the keys ``rope.*`` and of the tensors of factors.

    A factor alone is of the linear kind, and older files call it ``rope.scale_linear``. Of the
    factors for short and for long texts llama.cpp takes one by the size of its context; here the
    length of the text decides, as in transformers.

    Args:
        dims: how many of a head's dimensions rotate.
        interleaved: see :class:`colrow.layers.options.RopeConfig`.

    Raises:
        ValueError: a kind of scaling that the decoder lacks, or keys that contradict each other.
    """

    def value(key: str, default: object = None) -> object:
        return reader.metadata_value(f"{architecture}.{key}", default)

    def number(key: str, default: float) -> float:
        found = value(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ValueError(f"{reader.description} has {architecture}.{key}={found!r}")
        return float(found)

    names = reader.names()
    kind = value("rope.scaling.type", "linear")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0)) or 1.0
    by_length = {LONG, SHORT} <= names
    known = ("none", "linear", "yarn", *(("longrope",) if by_length else ()))
    if kind not in known:
        raise ValueError(
            f"{reader.description}: rope scaling {kind!r} is not supported"
            + (" without tensors of factors" if kind == "longrope" else "")
        )
    options: dict[str, Any] = {
        "theta": number("rope.freq_base", 10000.0),
        "dims": dims,
        "attention_factor": number("rope.scaling.attn_factor", 1.0),
        "interleaved": interleaved,
    }
    trained = int(number("context_length", 0.0))
    original = int(number("rope.scaling.original_context_length", 0.0)) or trained
    if by_length or EVERYWHERE in names:
        if kind == "yarn" or (factor != 1 and kind != "none"):
            raise ValueError(
                f"{reader.description} has tensors of rotary factors and rope scaling {kind!r} "
                f"with factor {factor:g}, which is not supported"
            )
        if EVERYWHERE in names:
            return _everywhere(_factors(reader, EVERYWHERE), options, original)
        return RopeConfig(
            **options,
            scaling="longrope",
            short_factors=_factors(reader, SHORT),
            long_factors=_factors(reader, LONG),
            original_max_positions=original,
        )
    if kind == "yarn":
        if number("rope.scaling.yarn_ext_factor", -1.0) == 0:
            raise ValueError(
                f"{reader.description} has {architecture}.rope.scaling.yarn_ext_factor=0, which is "
                "not supported with rope scaling 'yarn'"
            )
        options["attention_factor"] *= yarn_magnitude(factor)
        return RopeConfig(
            **options,
            scaling="yarn",
            factor=factor,
            original_max_positions=original,
            beta_fast=number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=number("rope.scaling.yarn_beta_slow", 1.0),
        )
    if kind == "linear" and factor != 1:
        return RopeConfig(**options, scaling="linear", factor=factor)
    return RopeConfig(**options)


def _factors(reader: GGUFTensorReader, name: str) -> tuple[float, ...]:
    return tuple(reader.read(name, dtype=torch.float64).flatten().tolist())


def _everywhere(factors: tuple[float, ...], options: dict[str, Any], original: int) -> RopeConfig:
    """Factors for texts of any length: those of Llama 3.1 by name, others as they are."""
    plain = rope_frequencies(RopeConfig(**options)).double()
    divided = plain / torch.tensor(factors, dtype=torch.float64)
    for factor in _LLAMA_31:
        named = RopeConfig(**options, scaling="llama3", factor=factor)
        if torch.allclose(rope_frequencies(named).double(), divided, rtol=1e-5, atol=0):
            return named
    return RopeConfig(
        **options,
        scaling="longrope",
        short_factors=factors,
        long_factors=factors,
        original_max_positions=original,
    )
