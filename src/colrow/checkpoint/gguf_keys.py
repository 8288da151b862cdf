"""Keys of GGUF metadata: which change a model's numbers, and with which values they do not.

llama.cpp's loader reads the keys of the architecture's namespace (``llama.rope.freq_base``) that it
knows, and passes over the others. Here a key that is on no list is an error that names it.
"""

from __future__ import annotations

import math

from colrow.checkpoint.gguf_file import GGUFTensorReader

# What config_from_gguf reads.
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
}
# What llama.cpp reads and does not compute with.
_UNUSED = {"rope.scaling.finetuned"}
# What the decoder has none of, to the values that mean none of it.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (-1, 0),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 0),
    "rope.scaling.yarn_log_multiplier": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}


def check_keys(reader: GGUFTensorReader, architecture: str, further: frozenset[str]) -> None:
    """Refuses a file that is no model, and what the decoder would compute differently.

    Args:
        further: keys of the architecture that its family reads.

    Raises:
        ValueError: naming the key and its value.
    """
    kind = reader.metadata_value("general.type", "model")
    if kind != "model":
        raise ValueError(
            f"{reader.description} has general.type {kind!r}: it is not a model by itself; give "
            "the model's own file"
        )
    version = reader.metadata_value("general.quantization_version", 2)
    if version != 2 and reader.is_quantised():
        raise ValueError(
            f"{reader.description} has general.quantization_version {version}, and only 2 can be "
            "read: quantise the model again with a current llama.cpp"
        )
    space = f"{architecture}."
    for key in sorted(reader.metadata_keys()):
        name = key.removeprefix(space)
        if name == key or name in _READ or name in _UNUSED or name in further:
            continue
        value = reader.metadata_value(key)
        if name not in _NEUTRAL or value not in _NEUTRAL[name]:
            raise ValueError(
                f"{reader.description} has {key}={value!r}, which is not supported: it may change "
                "the numbers in a way that this decoder does not know"
            )


def check_scale(reader: GGUFTensorReader, architecture: str, head_dim: int) -> None:
    """Refuses attention scores that are not divided by the root of the head's size."""
    scale = reader.metadata_value(f"{architecture}.attention.scale", 0)
    usual = head_dim**-0.5
    if scale != 0 and not (isinstance(scale, float) and math.isclose(scale, usual, rel_tol=1e-5)):
        raise ValueError(
            f"{reader.description} has {architecture}.attention.scale={scale!r}, which is not "
            f"supported: {usual:g} is, for heads of {head_dim}"
        )


def check_vocabulary(reader: GGUFTensorReader, vocab_size: int) -> None:
    """Refuses an embedding that has not one row for each token of the file's tokenizer."""
    for key in (
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.tokens",
    ):  # the first is faster to read
        listed = reader.metadata_value(key)
        if isinstance(listed, list):
            if len(listed) != vocab_size:
                raise ValueError(
                    f"{reader.description} has {len(listed)} tokens in {key}, but "
                    f"token_embd.weight has {vocab_size} rows"
                )
            return
