"""What a GGUF file says about its model: configuration and tensor names.

Keys and names: the GGUF specification, sections "Standardized key-value pairs" and "Standardized
tensor names".
"""

from __future__ import annotations

from typing import Any

from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.checkpoint.gguf_keys import check_keys, check_scale, check_vocabulary
from colrow.checkpoint.gguf_limits import check_gguf_numbers
from colrow.checkpoint.gguf_rope import rope_from_gguf
from colrow.checkpoint.gguf_tokens import named_ends, token_id
from colrow.checkpoint.reader import TensorReader
from colrow.models.config import ModelConfig
from colrow.models.families import families
from colrow.models.families.family import Family, GGUFForm


def config_from_gguf(reader: TensorReader) -> ModelConfig:
    """The configuration in the metadata of a GGUF file.

    Raises:
        ValueError: an architecture or a feature that the decoder lacks, or a missing key.
    """
    if not isinstance(reader, GGUFTensorReader):
        raise ValueError(f"{reader.description} is not a GGUF file")
    architecture = str(reader.metadata_value("general.architecture", ""))
    family, form = _family(reader, architecture)
    check_gguf_numbers(reader, architecture)
    check_keys(reader, architecture, form.reads.union(form.keys.values()))

    def number(key: str, default: float | None = None) -> float:
        value = reader.metadata_value(f"{architecture}.{key}", default)
        if isinstance(value, list) and value:  # a number for each layer
            if len(set(value)) > 1:
                raise ValueError(
                    f"{reader.description} has {architecture}.{key}={value!r}: layers that differ "
                    "are not supported"
                )
            value = value[0]
        if not isinstance(value, int | float):
            raise ValueError(f"{reader.description} has no number {architecture}.{key}")
        return value

    def equal(key: str, expected: int, what: str) -> None:
        if number(key, expected) != expected:
            raise ValueError(
                f"{reader.description} has {architecture}.{key}={number(key):g}, but {what} is "
                f"{expected}"
            )

    names = reader.names()
    hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
    head_dim = int(number("attention.key_length", hidden // max(1, heads)))
    vocab_size = reader.shape("token_embd.weight")[0]
    equal("attention.value_length", head_dim, "the length of keys")
    equal("vocab_size", vocab_size, "the number of rows of token_embd.weight")
    check_vocabulary(reader, vocab_size)
    if "attention.scale" not in form.reads:
        check_scale(reader, architecture, head_dim)
    window = int(number("attention.sliding_window", 0))
    if window and not form.windows:
        raise ValueError(
            f"{reader.description} has {architecture}.attention.sliding_window={window}, which is "
            f"not supported for {family.name} models"
        )
    layers = int(number("block_count"))
    fields: dict[str, Any] = dict(form.fixed)
    fields |= {field: int(number(key)) for field, key in form.keys.items()}
    if fields["position"] == "rope":
        dims = int(number("rope.dimension_count", head_dim))
        if not family.rope.partial:
            equal("rope.dimension_count", head_dim, "the size of a head")
        fields["rope"] = rope_from_gguf(
            reader, architecture, dims, interleaved=family.rope.interleaved
        )
    for field, tensor in form.optional_biases.items():
        fields[field] = tensor in names
    is_rms = fields["norm"] == "rmsnorm"
    epsilon = "layer_norm_rms_epsilon" if is_rms else "layer_norm_epsilon"
    fields |= {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(number("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "ffn_size": int(number("feed_forward_length")),
        "max_positions": int(number("context_length")),
        "norm_eps": float(number(f"attention.{epsilon}")),
        "tie_embeddings": "output.weight" not in names,
        "windows": (window,) * layers if window else (),
        "bos_token_id": token_id(reader, "bos"),
        "eos_token_ids": named_ends(reader),
        "pad_token_id": token_id(reader, "padding"),
    }
    family.complete_gguf(fields, number, names)
    return family.compose(fields)


def _family(reader: GGUFTensorReader, architecture: str) -> tuple[Family, GGUFForm]:
    """The family whose form the file has.

    Several share an architecture: of those the one whose keys the file has, most of them first.

    Raises:
        ValueError: an architecture that no family has.
    """
    keys = reader.metadata_keys()
    found = [
        (family, family.gguf)
        for family in families().values()
        if family.gguf is not None
        and family.gguf.architecture == architecture
        and all(_has(reader, keys, f"{architecture}.{key}") for key in family.gguf.keys.values())
    ]
    if not found:
        known = sorted({f.gguf.architecture for f in families().values() if f.gguf is not None})
        raise ValueError(
            f"{reader.description} holds a model of architecture {architecture!r}; GGUF files of "
            f"{', '.join(known)} can be read"
        )
    return max(found, key=lambda each: len(each[1].keys))


def _has(reader: GGUFTensorReader, keys: frozenset[str], key: str) -> bool:
    """Whether a file has this key; 0 is as good as none (``expert_count`` of dense models)."""
    return key in keys and reader.metadata_value(key) != 0
