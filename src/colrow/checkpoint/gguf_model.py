"""What a GGUF file says about its model: configuration and tensor names.

Keys and names: the GGUF specification, sections "Standardized key-value pairs" and "Standardized
tensor names".
"""

from __future__ import annotations

from collections.abc import Mapping

from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.checkpoint.gguf_keys import check_keys, check_scale, check_vocabulary
from colrow.checkpoint.gguf_limits import check_gguf_numbers
from colrow.checkpoint.gguf_tokens import named_ends, token_id
from colrow.checkpoint.naming import Naming
from colrow.checkpoint.reader import TensorReader
from colrow.layers.options import RopeConfig
from colrow.models.config import ModelConfig

_SEPARATE_QKV = ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v")
_MODULES: dict[str, tuple[str, ...]] = {
    "embedding": ("token_embd",),
    "positions": ("position_embd",),
    "blocks.{i}.attention_norm": ("blk.{i}.attn_norm",),
    "blocks.{i}.attention.query_norm": ("blk.{i}.attn_q_norm",),
    "blocks.{i}.attention.key_norm": ("blk.{i}.attn_k_norm",),
    "blocks.{i}.attention.output": ("blk.{i}.attn_output",),
    "blocks.{i}.mlp_norm": ("blk.{i}.ffn_norm",),
    "blocks.{i}.mlp.down": ("blk.{i}.ffn_down",),
    "norm": ("output_norm",),
    "head": ("output",),
}
_GATED: dict[str, tuple[str, ...]] = {
    **_MODULES,
    "blocks.{i}.attention.qkv": _SEPARATE_QKV,
    "blocks.{i}.mlp.up": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
}
_FUSED: dict[str, tuple[str, ...]] = {
    **_MODULES,
    "blocks.{i}.attention.qkv": ("blk.{i}.attn_qkv",),
    "blocks.{i}.mlp.up": ("blk.{i}.ffn_up",),
}

_ROTARY: dict[str, object] = {"norm": "rmsnorm", "position": "rope", "freeze_padding": True}

# Fields that a GGUF architecture fixes. Its llama files also hold Mistral and SmolLM models.
_ARCHITECTURES: Mapping[str, dict[str, object]] = {
    "llama": _ROTARY,
    "qwen2": {**_ROTARY, "qkv_bias": True},
    "qwen3": {**_ROTARY, "qk_norm": True},
    "gpt2": {
        "norm": "layernorm",
        "position": "learned",
        "activation": "gelu_tanh",
        "gated": False,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "scaled_residual_init": True,
    },
}

# Of the llama architecture alone, whose files have them or not.
_OPTIONAL_BIASES = {
    "qkv_bias": "blk.0.attn_q.bias",
    "output_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_gate.bias",
}


def gguf_naming(config: ModelConfig) -> Naming:
    """Names of the tensors in a GGUF file of this model."""
    if config.family == "gpt2":
        return Naming(_FUSED, "side_by_side")
    # The converter stores the llama architecture's Q and K as interleaved rotary pairs.
    return Naming(_GATED, "separate", paired_heads=config.family == "llama")


def config_from_gguf(reader: TensorReader) -> ModelConfig:
    """The configuration in the metadata of a GGUF file.

    Raises:
        ValueError: an architecture or a feature that the decoder lacks, or a missing key.
    """
    if not isinstance(reader, GGUFTensorReader):
        raise ValueError(f"{reader.description} is not a GGUF file")
    architecture = str(reader.metadata_value("general.architecture", ""))
    if architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{reader.description} holds a model of architecture {architecture!r}; GGUF files of "
            f"{', '.join(_ARCHITECTURES)} can be read"
        )
    if "rope_freqs.weight" in reader.names():
        raise ValueError(
            f"{reader.description} scales rotary frequencies by a tensor (Llama 3.1 and later), "
            "which is not supported; use the Hugging Face directory of the model"
        )
    check_gguf_numbers(reader, architecture)
    check_keys(reader, architecture)

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
    check_scale(reader, architecture, head_dim)
    window = int(number("attention.sliding_window", 0))
    layers = int(number("block_count"))
    fields: dict[str, object] = dict(_ARCHITECTURES[architecture])
    if fields["position"] == "rope":
        equal("rope.dimension_count", head_dim, "the size of a head")
        fields["rope"] = _rope(reader, architecture, head_dim)
    if architecture == "llama":
        for field, tensor in _OPTIONAL_BIASES.items():
            fields[field] = tensor in names
    is_rms = fields["norm"] == "rmsnorm"
    epsilon = "layer_norm_rms_epsilon" if is_rms else "layer_norm_epsilon"
    return ModelConfig(
        family=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(number("attention.head_count_kv", heads)),
        head_dim=head_dim,
        ffn_size=int(number("feed_forward_length")),
        max_positions=int(number("context_length")),
        norm_eps=float(number(f"attention.{epsilon}")),
        tie_embeddings="output.weight" not in names,
        windows=(window,) * layers if window else (),
        bos_token_id=token_id(reader, "bos"),
        eos_token_ids=named_ends(reader),
        pad_token_id=token_id(reader, "padding"),
        **fields,  # type: ignore[arg-type]
    )


def _rope(reader: GGUFTensorReader, architecture: str, head_dim: int) -> RopeConfig:
    """A factor alone is of the linear kind, and older files call it ``rope.scale_linear``."""

    def value(key: str, default: object = None) -> object:
        return reader.metadata_value(f"{architecture}.rope.{key}", default)

    def number(key: str, default: float) -> float:
        found = value(key, default)
        if not isinstance(found, int | float):
            raise ValueError(f"{reader.description} has {architecture}.rope.{key}={found!r}")
        return float(found)

    kind = value("scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"{reader.description}: rope scaling {kind!r} is not supported")
    factor = number("scaling.factor", number("scale_linear", 0.0)) or 1.0
    scaled = kind == "linear" and factor != 1.0
    return RopeConfig(
        theta=number("freq_base", 10000.0),
        dims=head_dim,
        scaling="linear" if scaled else "default",
        factor=factor if scaled else 1.0,
    )
