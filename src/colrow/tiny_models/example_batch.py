"""A batch for any tiny model, and the start of something that it can continue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.tiny_models.architectures import CLASSES, Architecture

BATCH, SEQUENCE = 2, 11
# Codes of several streams at once instead of tokens.
MUSIC = ("musicgen", "musicgen_melody")


def batch(architecture: Architecture, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of the forward pass with which the model computes its loss.

    Token ids are ``[2, 11]``; images and sound are in the model's dtype.
    """
    config, kind, name = model.config, architecture.task, architecture.model_type
    if kind == "classifier":
        return {"pixel_values": _images(model), "labels": torch.arange(BATCH) % CLASSES}
    ids = _tokens(0, config)
    if kind == "two towers":
        return {"input_ids": ids, "pixel_values": _images(model), "return_loss": True}
    if kind == "encoder-decoder":
        start = {"input_features": _sound(model)} if name == "whisper" else {"input_ids": ids}
        return {**start, "decoder_input_ids": _tokens(2, config), "labels": _tokens(1, config)}
    if name in MUSIC:
        return {"input_ids": _codes(config), "labels": _codes(config).view(BATCH, SEQUENCE, -1)}
    if kind == "masked LM":
        return {"input_ids": ids, "labels": _tokens(1, config)}
    images = {"pixel_values": _images(model)} if name == "git" else {}
    return {"input_ids": ids, "labels": ids, "use_cache": False, **images}


def prompt(architecture: Architecture, model: nn.Module) -> dict[str, Any] | None:
    """What ``model.generate`` continues; None where there is nothing to continue."""
    inputs = batch(architecture, model)
    if architecture.model_type in MUSIC:
        return {"input_ids": inputs["input_ids"][::BATCH, :5]}
    if architecture.task == "causal LM":
        start = {"input_ids": inputs["input_ids"][:1, :5]}
        return start | {key: inputs[key][:1] for key in ("pixel_values",) if key in inputs}
    if architecture.task == "encoder-decoder":
        return {key: inputs[key][:1] for key in ("input_ids", "input_features") if key in inputs}
    return None


def _tokens(stream: int, config: Any) -> Tensor:
    """Plain tokens: none of the special ones at either end of the vocabulary."""
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or config.vocab_size
    bits = rng.bits(rng.stream_key(stream, "zoo"), torch.arange(BATCH * SEQUENCE))
    return bits.remainder(vocabulary - 12).view(BATCH, SEQUENCE) + 3


def _codes(config: Any) -> Tensor:
    """Several streams of audio codes, ``[batch * codebooks, sequence]``."""
    return torch.cat([_tokens(stream, config) for stream in range(config.num_codebooks)])


def _images(model: nn.Module) -> Tensor:
    config: Any = getattr(model.config, "vision_config", None) or model.config
    size = config.image_size
    return _normal(model, BATCH, 3, size, size)


def _sound(model: nn.Module) -> Tensor:
    config: Any = model.config
    return _normal(model, BATCH, config.num_mel_bins, 2 * config.max_source_positions)


def _normal(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(next(model.parameters()).dtype)
