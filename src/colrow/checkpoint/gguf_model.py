"""What a GGUF file says about its model: configuration and tensor names.

Keys and names: the GGUF specification, sections "Standardized key-value pairs" and "Standardized
tensor names".
"""

from __future__ import annotations

from collections.abc import Mapping

from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.checkpoint.gguf_limits import check_gguf_numbers
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

    def number(key: str, default: float | None = None) -> float:
        value = reader.metadata_value(f"{architecture}.{key}", default)
        if not isinstance(value, int | float):
            raise ValueError(f"{reader.description} has no number {architecture}.{key}")
        return value

    names = reader.names()
    hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
    head_dim = int(number("attention.key_length", hidden // heads))
    window = int(number("attention.sliding_window", 0))
    layers = int(number("block_count"))
    fields: dict[str, object] = dict(_ARCHITECTURES[architecture])
    if fields["position"] == "rope":
        fields["rope"] = _rope(reader, architecture, head_dim)
    is_rms = fields["norm"] == "rmsnorm"
    epsilon = "layer_norm_rms_epsilon" if is_rms else "layer_norm_epsilon"
    eos = reader.metadata_value("tokenizer.ggml.eos_token_id")
    return ModelConfig(
        family=architecture,
        vocab_size=reader.shape("token_embd.weight")[0],
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
        bos_token_id=_token(reader, "bos"),
        eos_token_ids=(eos,) if isinstance(eos, int) else (),
        pad_token_id=_token(reader, "padding"),
        **fields,  # type: ignore[arg-type]
    )


def _token(reader: GGUFTensorReader, name: str) -> int | None:
    value = reader.metadata_value(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) else None


def _rope(reader: GGUFTensorReader, architecture: str, head_dim: int) -> RopeConfig:
    def value(key: str, default: float) -> float:
        found = reader.metadata_value(f"{architecture}.rope.{key}", default)
        return float(found) if isinstance(found, int | float) else default

    kind = str(reader.metadata_value(f"{architecture}.rope.scaling.type", "none"))
    if kind not in ("none", "linear"):
        raise ValueError(f"{reader.description}: rope scaling {kind!r} is not supported")
    return RopeConfig(
        theta=value("freq_base", 10000.0),
        dims=int(value("dimension_count", head_dim)),
        scaling="linear" if kind == "linear" else "default",
        factor=value("scaling.factor", 1.0),
    )
