"""GGUF files of the families that differ from LLaMA, as the usual converter writes them, and back.

The names of tensors come from the gguf package's own map, the weights from transformers' models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import colrow
from colrow.checkpoint.export_gguf import pair, write_gguf
from colrow.comm.group import ParallelGroup
from colrow.verification.comparison import relative_error
from colrow.verification.reference import load_reference, precision, quiet_transformers
from tests.models import tiny
from tests.ranks import RankPool

FAMILIES = {
    "llama-biased-tied": gguf.MODEL_ARCH.LLAMA,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "phi4": gguf.MODEL_ARCH.PHI3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "cohere": gguf.MODEL_ARCH.COMMAND_R,
    "cohere2": gguf.MODEL_ARCH.COHERE2,
    "falcon": gguf.MODEL_ARCH.FALCON,
    "falcon-new": gguf.MODEL_ARCH.FALCON,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
PAIRED = {"llama-biased-tied", "mixtral", "granite", "smollm3"}
EPS = 2.0**-17  # which fp32 holds
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 7,  # so that one of Gemma's sees all keys
    "intermediate_size": 101,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "rms_norm_eps": EPS,
}
FURTHER: dict[str, dict[str, Any]] = {
    "llama-biased-tied": {
        **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), True),
        "rope_parameters": {**tiny.LLAMA3_ROPE, "original_max_position_embeddings": 8192},
    },
    "gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 23,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7},
    "phi4": {
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.25, 1.5],
            "long_factor": [1.0, 2.5, 4.5],
            "attention_factor": 1.25,
        },
        "tie_word_embeddings": True,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.375,
        "logits_scaling": 4.0,
        "attention_bias": True,
    },
    "cohere": {"layer_norm_eps": EPS, "logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"layer_norm_eps": EPS, "logit_scale": 0.25, "sliding_window": 7},
    "falcon": {"layer_norm_epsilon": EPS, "ffn_hidden_size": 101},
    "falcon-new": {
        "layer_norm_epsilon": EPS,
        "ffn_hidden_size": 101,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "starcoder2": {"norm_epsilon": EPS},
    "glm4": {"head_dim": 8},
}
# Names of numbers in the metadata, as the converter writes them.
NUMBERS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention.sliding_window": 7,
    },
    "phi4": {"rope.scaling.attn_factor": 1.25, "rope.scaling.original_context_length": 32},
    "granite": {
        "embedding_scale": 3.0,
        "residual_scale": 0.25,
        "attention.scale": 0.375,
        "logit_scale": 4.0,
    },
    "cohere": {"logit_scale": 0.25, "rope.scaling.type": "none"},
    "cohere2": {"logit_scale": 0.25, "attention.sliding_window": 7, "rope.scaling.type": "none"},
    "mixtral": {"expert_count": 5, "expert_used_count": 2},
    "gemma3": {"attention.sliding_window": 7},
    "qwen3_moe": {
        "expert_count": 5,
        "expert_used_count": 2,
        "expert_feed_forward_length": 23,
    },
}


def make(name: str, directory: Path, **further: Any) -> Any:
    """transformers' model, whose weights fp32 holds, saved; it is read again in fp64."""
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        kind = tiny.CASES[name][0]
        keys = {**SIZES, **FURTHER.get(name, {}), **further}
        config = AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, pad_token_id=0, **keys)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
                if parameter.dim() == 1:  # of which 1 more has no more digits
                    parameter.add_(1).sub_(1)
        model.save_pretrained(directory)
    return load_reference(directory, torch.float64)


def written(
    name: str,
    model: Any,
    directory: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """The directory's tensors in a GGUF file, matrices as this type."""
    from safetensors.torch import load_file

    config, arch = model.config, FAMILIES[name]
    space = gguf.MODEL_ARCH_NAMES[arch]
    writer = gguf.GGUFWriter(str(path), space)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    width = getattr(config, "intermediate_size", SIZES["intermediate_size"])
    writer.add_feed_forward_length(width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if name == "falcon" else 2)
    writer.add_vocab_size(config.vocab_size)
    is_rms = not any("layernorm" in type(m).__name__.lower() for m in model.modules())
    (writer.add_layer_norm_rms_eps if is_rms else writer.add_layer_norm_eps)(EPS)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if name.startswith("gemma"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_rope_dimension_count(int(8 * rope.get("partial_rotary_factor", 1)))
    for key, value in NUMBERS.get(name, {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{space}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    for key, tensor in converted(name, load_file(directory / "model.safetensors"), config).items():
        array = tensor.contiguous().numpy()
        if tensor.dim() > 1:
            writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(name: str, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Under the file's names: experts in one tensor, rotary pairs, norms with the 1 added."""
    names = gguf.get_tensor_name_map(FAMILIES[name], config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        if ".experts." in key:
            before, _, rest = key.partition(".experts.")
            number, which, _ = rest.split(".")
            assert int(number) == len(experts.setdefault(f"{before}.experts.{which}", []))
            experts[f"{before}.experts.{which}"].append(tensor)
            continue
        if name in PAIRED and (".q_proj." in key or ".k_proj." in key):
            tensor = pair(tensor, config.hidden_size // config.num_attention_heads)
        if name.startswith("gemma") and key.endswith("norm.weight"):
            tensor = tensor + 1
        if "query_key_value" in key:
            groups = tensor.view(1 if name == "falcon" else 2, -1, 8, *tensor.shape[1:])
            parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
            tensor = torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target is not None, key
        found[target] = tensor
    if name == "llama-biased-tied":  # Llama 3.1's scaling, as what each frequency is divided by
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, 8, 2) / 8)
        assert (plain / scaled).max() > 1.5
        found["rope_freqs.weight"] = plain / scaled
    if name == "phi4":
        for which in ("long", "short"):
            factors = config.rope_parameters[f"{which}_factor"]
            found[f"rope_factors_{which}.weight"] = torch.tensor(factors)
    for key, parts in experts.items():
        target = names.get_name(f"{key}.weight", try_suffixes=(".weight",))
        assert target is not None, key
        found[target] = torch.stack(parts)
    return found


def assembled(tp: ParallelGroup, path: Path) -> dict[str, Tensor]:
    return colrow.full_state_dict(colrow.from_pretrained(path, tp, dtype=torch.float32))


@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_read_and_written_as_the_converter_does(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file

    theirs = make(name, tmp_path / "hf")
    path = written(name, theirs, tmp_path / "hf", tmp_path / "a.gguf")
    model = colrow.from_pretrained(path, dtype=torch.float64)
    ids = tiny.batch()
    with torch.no_grad(), precision(torch.float64):
        expected = theirs(input_ids=ids).logits
    assert relative_error(model(ids), expected) <= 1e-12

    stored = load_file(tmp_path / "hf" / "model.safetensors")
    whole = ranks(3, assembled, path)[0]
    assert whole.keys() == stored.keys()
    assert [key for key, tensor in stored.items() if not torch.equal(whole[key], tensor)] == []

    from_directory = colrow.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    write_gguf(from_directory, tmp_path / "b.gguf", path, torch.float32)
    ours, usual = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(file)).tensors}
        for file in (tmp_path / "b.gguf", path)
    )
    assert ours.keys() == usual.keys()
    for key in usual:
        assert ours[key].shape == usual[key].shape and (ours[key] == usual[key]).all(), key


def test_the_one_added_to_norms_costs_no_digits(tmp_path: Path) -> None:
    """1 + 1e-3 has no place in bf16; the file holds it in fp32."""
    theirs = make("gemma3", tmp_path / "hf")
    like = written("gemma3", theirs, tmp_path / "hf", tmp_path / "like.gguf")
    model = colrow.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(torch.linspace(-3e-3, 3e-3, len(weight)))
    write_gguf(model, tmp_path / "a.gguf", like, torch.float32)
    read = colrow.from_pretrained(tmp_path / "a.gguf", dtype=torch.bfloat16).state_dict()
    for name, weight in model.state_dict().items():
        if "norm" in name:
            assert torch.equal(read[name], weight), name
