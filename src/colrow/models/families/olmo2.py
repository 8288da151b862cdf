"""OLMo 2 (OLMo team 2025): norms behind the layers, and norms of all queries and of all keys."""

from __future__ import annotations

from colrow.models.families import llama
from colrow.models.families.family import Family, GGUFForm

_FORM: dict[str, object] = {"norms": "after", "norm_wide": True, "qk_norm": "all_heads"}


def _behind(
    modules: dict[str, tuple[str, ...]], attention: str, mlp: str
) -> dict[str, tuple[str, ...]]:
    """The names with those of the norms behind the layers in place of those in front of them."""
    before = ("blocks.{i}.attention_norm", "blocks.{i}.mlp_norm")
    return {name: files for name, files in modules.items() if name not in before} | {
        "blocks.{i}.attention_post_norm": (attention,),
        "blocks.{i}.mlp_post_norm": (mlp,),
    }


FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    modules=_behind(
        llama.MODULES,
        "model.layers.{i}.post_attention_layernorm",
        "model.layers.{i}.post_feedforward_layernorm",
    ),
    keys={**llama.KEYS, "qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    fixed={**llama.FIXED, **_FORM},
    defaults={"rms_norm_eps": 1e-5},
    gguf=GGUFForm(
        "olmo2",
        _behind(llama.GGUF_MODULES, "blk.{i}.post_attention_norm", "blk.{i}.post_ffw_norm"),
        {**llama.GGUF_FIXED, **_FORM},
        windows=False,  # llama.cpp takes them for those of OLMo 3
    ),
)
