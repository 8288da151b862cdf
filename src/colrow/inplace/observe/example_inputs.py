"""Small batches with which a model can be run, made up from its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from colrow import rng

BATCH, SEQUENCE = 2, 8


def example_batches(model: nn.Module) -> list[dict[str, Any]]:
    """Batches that together call every layer: with an encoder's states where they are optional."""
    batch = example_batch(model)
    accepted = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    if "encoder_hidden_states" not in accepted or getattr(config, "is_encoder_decoder", False):
        return [batch]
    first = next(model.parameters())
    width = getattr(config, "cross_attention_hidden_size", None) or getattr(
        config, "hidden_size", None
    )
    if width is None:
        return [batch]
    states = _normal((BATCH, SEQUENCE, width), first).to(first.device)
    return [batch, batch | {"encoder_hidden_states": states}]


def example_batch(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of ``model.forward``: token ids ``[2, 8]``, images or sound.

    Raises:
        ValueError: when the model does not say what it takes; then ``example_inputs`` must.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"{type(model).__name__} does not say what its forward takes: give example_inputs, a "
            "dictionary of keyword arguments for one small forward pass"
        )
    accepted = inspect.signature(model.forward).parameters
    first = next(model.parameters())
    batch: dict[str, Any] = {}
    if main == "input_ids" or "input_ids" in accepted:
        batch["input_ids"] = _tokens(0, config)
    if main == "pixel_values" or _sees(model, main) or _two_towers(model):
        batch["pixel_values"] = _images(config, first)
    if main == "input_features":
        shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        batch["input_features"] = _normal(shape, first)
        batch.pop("input_ids", None)
    codebooks = getattr(config, "num_codebooks", None)
    if codebooks and "input_ids" in batch and "musicgen" in getattr(config, "model_type", ""):
        batch["input_ids"] = torch.cat([_tokens(i, config) for i in range(codebooks)])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = _tokens(2, config)
    if "use_cache" in accepted:
        batch["use_cache"] = False
    return {
        key: value.to(first.device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _sees(model: nn.Module, main: str) -> bool:
    """Whether it needs images besides tokens: not where a part of its own reads the text."""
    config: Any = model.config
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        return False
    if getattr(config, "vision_config", None) is None:
        return False
    return ("text_config" in getattr(type(config), "sub_configs", {})) == (main != "input_ids")


def _two_towers(model: nn.Module) -> bool:
    accepted = inspect.signature(model.forward).parameters
    return "pixel_values" in accepted and "return_loss" in accepted


def _tokens(stream: int, config: Any) -> Tensor:
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or config.vocab_size
    bits: Tensor = rng.bits(rng.stream_key(stream, "parallelize"), torch.arange(BATCH * SEQUENCE))
    ids: Tensor = bits.remainder(max(1, vocabulary - 8)).view(BATCH, SEQUENCE)
    first = min(3, int(vocabulary) - 1)
    return ids + first


def _images(config: Any, like: Tensor) -> Tensor:
    vision = getattr(config, "vision_config", None) or config
    size, channels = vision.image_size, getattr(vision, "num_channels", 3)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return _normal((BATCH, channels, height, width), like)


def _normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(like.dtype)
