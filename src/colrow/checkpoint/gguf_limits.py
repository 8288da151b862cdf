"""The numbers in a GGUF file's metadata, looked at before anything is computed from them."""

from __future__ import annotations

from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.models.config_limits import SIZES, check_number, check_whole

_WHOLE = {
    "embedding_length": "hidden_size",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "feed_forward_length": "ffn_size",
    "context_length": "max_positions",
    "rope.scaling.original_context_length": "max_positions",
    "vocab_size": "vocab_size",
}
_NUMBERS = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)


def check_gguf_numbers(reader: GGUFTensorReader, architecture: str) -> None:
    """Makes sure that sizes are whole numbers that a model can have, and the others finite.

    A list has a number for each layer.

    Raises:
        ValueError: naming the file and the key of the first that is not.
    """
    for key, field in {**_WHOLE, "attention.sliding_window": "max_positions"}.items():
        least = 0 if key == "attention.sliding_window" else 1
        for name, value in _values(reader, f"{architecture}.{key}"):
            check_whole(name, value, least, SIZES[field])
    for key in _NUMBERS:
        for name, value in _values(reader, f"{architecture}.{key}"):
            check_number(name, value)


def _values(reader: GGUFTensorReader, key: str) -> list[tuple[str, object]]:
    value = reader.metadata_value(key)
    if value is None:
        return []
    name = f"{reader.description}: {key}"
    # What differs from layer to layer is looked at once for each value.
    values = list(dict.fromkeys(value)) if isinstance(value, list) else [value]
    return [(name, each) for each in values]
