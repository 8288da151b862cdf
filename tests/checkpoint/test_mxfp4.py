"""Experts in MXFP4, as gpt-oss is published, against what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import colrow
from colrow.checkpoint.mxfp4 import Mxfp4Reader
from colrow.checkpoint.opening import open_reader
from colrow.comm.collectives import gather_from_tp
from colrow.comm.group import ParallelGroup
from colrow.verification.comparison import relative_error
from colrow.verification.reference import load_reference, precision, quiet_transformers
from tests.models import tiny
from tests.ranks import RankPool

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "rope_parameters": tiny.YARN,
}


def packed(experts: int, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Blocks of every byte, and scales."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator)
    scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def write(directory: Path) -> dict[str, Tensor]:
    """A tiny gpt-oss with its experts in MXFP4; the matrices that these mean, by name."""
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt_oss", **SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(directory)
    tensors, plain = load_file(directory / "model.safetensors"), {}
    for number, name in enumerate(sorted(tensors)):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, inputs, outputs = tensors.pop(name).shape
        blocks, scales = packed(experts, outputs, inputs, number)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(settings))
    return plain


def run(tp: ParallelGroup, directory: Path) -> tuple[Tensor, dict[str, Tensor]]:
    model = colrow.from_pretrained(directory, tp, dtype=torch.float64)
    logits = gather_from_tp(model(tiny.batch()), tp, partition=model.vocab)
    return logits.detach(), colrow.full_state_dict(model)


def test_they_are_read_as_the_matrices_that_they_mean(ranks: RankPool, tmp_path: Path) -> None:
    plain = write(tmp_path / "mxfp4")
    with open_reader(tmp_path / "mxfp4") as reader:
        assert isinstance(reader, Mxfp4Reader) and "MXFP4" in reader.description
        for name, matrix in plain.items():
            assert reader.shape(name) == matrix.shape
            for dtype in (torch.float64, torch.bfloat16):  # exact in both
                read = reader.read(name, ((1, 3),), ((0, 3), (40, 50)), dtype=dtype)
                expected = torch.cat([matrix[1:3, :3], matrix[1:3, 40:50]], dim=1)
                assert torch.equal(read.double(), expected.double()), name
        with pytest.raises(ValueError, match="no place in float16"):
            reader.read(name, dtype=torch.float16)

    tensors = load_file(tmp_path / "mxfp4" / "model.safetensors")
    tensors = {n: t for n, t in tensors.items() if not n.endswith(("_blocks", "_scales"))}
    settings = json.loads((tmp_path / "mxfp4" / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    save_file({**tensors, **plain}, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    reference = load_reference(tmp_path / "plain", torch.float64)
    with torch.no_grad(), precision(torch.float64):
        expected = reference(input_ids=tiny.batch()).logits
    logits, whole = ranks(3, run, tmp_path / "mxfp4")[0]
    assert relative_error(logits, expected) <= 1e-12
    for name, matrix in plain.items():
        assert torch.equal(whole[name], matrix.double()), name


def test_blocks_without_scales_are_refused(tmp_path: Path) -> None:
    blocks, scales = packed(2, 4, 64, 0)
    save_file(
        {"a_blocks": blocks, "a_scales": scales[:, :, :1].contiguous()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match="one scale for each 16 bytes"):
        open_reader(tmp_path / "a.safetensors")
