"""What is known of a causal language model of transformers from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow import rng
from colrow.models.interface import Description

_SPECIAL = 3, 12  # tokens at the lower end and at both ends that are not used as an example


def describe_config(config: Any) -> Description:
    """What transformers' configuration says of a model.

    Raises:
        ValueError: it is none of a model that continues a text.
    """
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type} is an encoder-decoder: what continues a text here has no encoder"
        )
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(f"the configuration of this {config.model_type} names no vocab_size")
    longest = getattr(text, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else None
    ends = getattr(config, "eos_token_id", None) or getattr(text, "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    padding = getattr(text, "pad_token_id", None)
    return Description(
        "in place",
        config.model_type,
        vocabulary,
        longest,
        longest is not None,  # what its own code does beyond is not known
        tuple(token for token in listed if isinstance(token, int)),
        padding if isinstance(padding, int) and padding >= 0 else None,
    )


def plain_tokens(
    vocab_size: int, count: int, device: torch.device | str, *, seed: int = 0
) -> Tensor:
    """Random tokens, but none of those at either end of the vocabulary, which may be special."""
    lowest, special = min(_SPECIAL[0], vocab_size - 1), _SPECIAL[1]
    bits = rng.bits(rng.stream_key(seed, "example"), torch.arange(count, device=device))
    return bits.remainder(max(1, vocab_size - special)) + lowest
