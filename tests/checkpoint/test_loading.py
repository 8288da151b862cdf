"""Whole models from files: GGUF of several architectures, and what a rank's memory sees of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

import colrow
from colrow.checkpoint.gguf_model import config_from_gguf
from colrow.checkpoint.load import unpair
from colrow.checkpoint.opening import open_reader
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.models.compose import fields_of
from colrow.models.config import common_attention
from colrow.verification.comparison import relative_error
from colrow.verification.reference import load_reference, precision
from colrow.verification.verify import Report, verify
from tests.models import tiny
from tests.ranks import RankPool

BLOCK = "blk.{i}."
COMMON = {
    "embedding": "token_embd",
    "blocks.{i}.attention_norm": BLOCK + "attn_norm",
    "blocks.{i}.attention.output": BLOCK + "attn_output",
    "blocks.{i}.attention.query_norm": BLOCK + "attn_q_norm",
    "blocks.{i}.attention.key_norm": BLOCK + "attn_k_norm",
    "blocks.{i}.mlp_norm": BLOCK + "ffn_norm",
    "blocks.{i}.mlp.down": BLOCK + "ffn_down",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}


def write(
    path: Path,
    family: str,
    keys: dict[str, Any],
    qtype: gguf.GGMLQuantizationType,
    fields: Mapping[str, Any] | None = None,
) -> colrow.Decoder:
    """A GGUF file of a random model, as the usual converter writes one; returns the model.

    ``fields`` are more of its metadata, in place of what it has; None takes one away.
    """
    torch.manual_seed(0)
    model = colrow.from_config({"model_type": family, **keys}, seed=1)
    config, sizes = model.config, fields_of(model.config)
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(sizes["ffn_size"])
    writer.add_head_count(sizes["num_heads"])
    writer.add_head_count_kv(sizes["num_kv_heads"])
    writer.add_vocab_size(config.vocab_size)
    if sizes["rope"] is not None:
        writer.add_rope_freq_base(sizes["rope"].theta)
        writer.add_rope_dimension_count(sizes["head_dim"])
        writer.add_layer_norm_rms_eps(config.norm.eps)
        writer.add_key_length(sizes["head_dim"])
        writer.add_value_length(sizes["head_dim"])
    else:
        writer.add_layer_norm_eps(config.norm.eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    for key, value in (fields or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            single = value[0] if isinstance(value, list) else value
            kind = gguf.GGUFValueType.get_type(single)
            sub_type = kind if isinstance(value, list) else None
            kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else kind
            writer.add_key_value(key, value, kind, sub_type=sub_type)
    for name, value in model.state_dict().items():
        for target, tensor in renamed(name, value, config).items():
            array = tensor.detach().numpy()
            if tensor.dim() == 1 or array.shape[-1] % 32:
                writer.add_tensor(target, array)
            else:
                writer.add_tensor(target, gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def renamed(name: str, value: Tensor, config: colrow.ModelConfig) -> dict[str, Tensor]:
    """One of our parameters as the tensors of a GGUF file."""
    module, kind = name.rsplit(".", 1)
    template, number = module, ""
    if module.startswith("blocks."):
        _, number, rest = module.split(".", 2)
        template = f"blocks.{{i}}.{rest}"
    block = BLOCK.format(i=number)
    if template.endswith("attention.qkv") and config.family != "gpt2":
        attention = common_attention(config)
        heads = [attention.num_heads, attention.num_kv_heads, attention.num_kv_heads]
        q, k, v = value.split([count * attention.head_dim for count in heads])
        if config.family == "llama":  # rows of a head as interleaved rotary pairs
            q, k = (
                t.view(-1, 2, attention.head_dim // 2, *t.shape[1:])
                .transpose(1, 2)
                .reshape(t.shape)
                for t in (q, k)
            )
        return {
            f"{block}attn_{n}.{kind}": t.contiguous() for n, t in zip("qkv", (q, k, v), strict=True)
        }
    if template.endswith("attention.qkv"):
        return {f"{block}attn_qkv.{kind}": value}
    if template.endswith("mlp.up") and fields_of(config)["gated"]:
        gate, up = value.chunk(2)
        return {f"{block}ffn_gate.{kind}": gate, f"{block}ffn_up.{kind}": up}
    if template.endswith("mlp.up"):
        return {f"{block}ffn_up.{kind}": value}
    return {f"{COMMON[template].format(i=number)}.{kind}": value}


def verified(tp: ParallelGroup, path: Path) -> Report | None:
    alone = ParallelGroup.single
    mesh = Mesh(tp, alone("dp"), alone("pp"), None, torch.device("cpu"))
    return verify(path, mesh, dtype=torch.float64, new_tokens=4)


@pytest.mark.parametrize(
    ("family", "keys", "qtype"),
    [
        ("llama", SIZES, "Q8_0"),
        ("llama", {**SIZES, "tie_word_embeddings": True}, "F16"),
        ("qwen2", SIZES, "Q4_1"),
        ("qwen3", {**SIZES, "head_dim": 128}, "BF16"),  # transformers reads no other head_dim
        ("gpt2", {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4}, "F32"),
    ],
)
def test_gguf_files_agree_with_transformers(
    ranks: RankPool, tmp_path: Path, family: str, keys: dict[str, Any], qtype: str
) -> None:
    path = tmp_path / f"{family}.gguf"
    write(path, family, keys, gguf.GGMLQuantizationType[qtype])
    report = ranks(3, verified, path)[0]
    assert report is not None
    assert report.passed, report


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """As DeepSeek-V3 is published, with a layer more than its configuration says."""
    from safetensors.torch import load_file, save_file

    reference = tiny.make("deepseek_v3", tmp_path)
    file = tmp_path / "model.safetensors"
    further = {"model.layers.3.enorm.weight": torch.ones(40)}
    save_file({**load_file(file), **further}, file, {"format": "pt"})
    model = colrow.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad(), precision(torch.float64):
        expected = reference.double()(input_ids=tiny.batch()).logits
    assert relative_error(model(tiny.batch()), expected) <= 1e-12
    save_file({**load_file(file), "model.layers.2.enorm.weight": torch.ones(40)}, file)
    with pytest.raises(ValueError, match=r"has model\.layers\.2\.enorm\.weight beyond what"):
        colrow.from_pretrained(tmp_path)


def test_pairs_become_halves() -> None:
    rows = torch.arange(8)  # two heads of 4: (0, 1), (2, 3) are the rotary pairs of the first
    assert unpair(rows, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_configuration_of_a_real_file(smollm2: Path) -> None:
    with open_reader(smollm2) as reader:
        config = config_from_gguf(reader)
    attention, mlp = common_attention(config), config.blocks[0].mlp
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (9, 3, 64)
    assert (config.hidden_size, mlp.ffn_size, config.vocab_size) == (576, 1536, 49152)
    assert config.num_layers == 30 and config.tie_embeddings and attention.rope is not None
    assert attention.rope.theta == 100000 and config.eos_token_ids == (2,)


def test_weights_of_a_real_file_are_bit_for_bit_transformers(smollm2: Path) -> None:
    whole = colrow.full_state_dict(colrow.from_pretrained(smollm2, dtype=torch.float32))
    theirs = load_reference(smollm2, torch.float32).state_dict()
    assert len(whole) == 272
    assert all(torch.equal(value, theirs[name]) for name, value in whole.items())


def test_an_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"architecture 'mamba'; GGUF files of cohere2, command-r"):
        colrow.from_pretrained(path)


MEASURE = """
import json, sys, threading, time
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import colrow, colrow.checkpoint.pretrained, gguf
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) * 1024 for l in status if l.startswith("RssAnon"))
rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
small = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1,
         "intermediate_size": 8, "num_attention_heads": 2, "max_position_embeddings": 8}
colrow.from_config(small)  # whatever torch loads when it is first used
before, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
model = colrow.from_pretrained(path, colrow.ParallelGroup(dist.group.WORLD, rank, size),
                               dtype=torch.float32)
running = False; thread.join()
held = sum(p.numel() * 4 for p in model.parameters())
print(json.dumps({"held": held, "peak": peak - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (2, 3)])
def test_a_rank_needs_memory_for_its_shard_alone(smollm2: Path, rank: int, size: int) -> None:
    """The whole model is 538 MB in fp32; a rank of two holds half, and little more at any time."""
    command = [sys.executable, "-c", MEASURE, str(rank), str(size), str(smollm2)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout.splitlines()[-1])
    print(measured)
    assert measured["held"] < 538e6 / size * 1.05
    assert measured["peak"] < measured["held"] + 20e6
