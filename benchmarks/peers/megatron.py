"""Megatron-Core's tensor-parallel layers and loss, in a decoder of the same arithmetic.

Its column- and row-parallel linears, vocab-parallel embedding and cross entropy run on CPU ranks;
its sequence parallelism and its Transformer Engine layers need CUDA. Between the layers is what the
plain decoder has, in Megatron's order of dimensions, ``[sequence, batch, hidden]``.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.plain import Norm, attend, rope
from benchmarks.peers.training import Trainer
from benchmarks.peers.workloads import Training


class Block(nn.Module):
    """Fused QKV and fused gate-up, as Megatron has them; attention per batch-first head."""

    def __init__(self, shape: Training, config: ModelParallelConfig) -> None:
        super().__init__()
        hidden, ffn = shape.hidden, shape.ffn
        self.head_dim = hidden // shape.heads
        options = {"config": config, "init_method": nn.init.zeros_, "bias": False}
        row = {**options, "input_is_parallel": True, "skip_bias_add": False}
        self.input_norm, self.mlp_norm = Norm(hidden), Norm(hidden)
        self.qkv = ColumnParallelLinear(hidden, 3 * hidden, gather_output=False, **options)
        self.output = RowParallelLinear(hidden, hidden, **row)
        self.gate_up = ColumnParallelLinear(hidden, 2 * ffn, gather_output=False, **options)
        self.down = RowParallelLinear(ffn, hidden, **row)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        fused = self.qkv(self.input_norm(x))[0].transpose(0, 1)
        mixed = attend(*fused.chunk(3, dim=-1), self.head_dim, tables)
        x = x + self.output(mixed.transpose(0, 1))[0]
        gate, up = self.gate_up(self.mlp_norm(x))[0].chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)[0]


class MegatronDecoder(nn.Module):
    """Token ids ``[batch, sequence]`` to local logits ``[sequence, batch, vocab_local]``."""

    def __init__(self, shape: Training) -> None:
        super().__init__()
        config = ModelParallelConfig(
            tensor_model_parallel_size=dist.get_world_size(),
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.float32,
            gradient_accumulation_fusion=False,
        )
        init = {"config": config, "init_method": nn.init.zeros_}
        self.embedding = VocabParallelEmbedding(shape.vocab, shape.hidden, **init)
        self.blocks = nn.ModuleList(Block(shape, config) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.head = ColumnParallelLinear(
            shape.hidden, shape.vocab, bias=False, gather_output=False, **init
        )
        self.tables = rope(shape.sequence, shape.hidden // shape.heads)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1).contiguous()
        for block in self.blocks:
            x = block(x, self.tables)
        return self.head(self.norm(x))[0]


class Megatron(Trainer):
    """Megatron-Core's layers on CPU ranks."""

    def build(self, directory: Path) -> nn.Module:
        parallel_state.initialize_model_parallel(dist.get_world_size())
        model = MegatronDecoder(self.workload)
        whole = load_file(directory / "model.safetensors")
        with torch.no_grad():
            _fill(model, whole, dist.get_rank(), dist.get_world_size())
        return model

    def loss(self) -> Tensor:
        logits = self.model(self.ids)
        labels = self.labels.t().contiguous()
        counted = labels != -100
        losses = vocab_parallel_cross_entropy(logits, labels.masked_fill(~counted, 0))
        return (losses * counted).sum() / counted.sum()


def _fill(model: MegatronDecoder, whole: dict[str, Tensor], rank: int, size: int) -> None:
    """This rank's rows and columns of the whole weights."""

    def rows(name: str) -> Tensor:
        return whole[f"{name}.weight"].chunk(size, dim=0)[rank]

    def columns(name: str) -> Tensor:
        return whole[f"{name}.weight"].chunk(size, dim=1)[rank]

    model.embedding.weight.copy_(rows("model.embed_tokens"))
    model.head.weight.copy_(rows("lm_head"))
    model.norm.weight.copy_(whole["model.norm.weight"])
    for index, block in enumerate(model.blocks):
        name = f"model.layers.{index}"
        attention = [rows(f"{name}.self_attn.{x}_proj") for x in "qkv"]
        block.qkv.weight.copy_(torch.cat(attention))
        block.output.weight.copy_(columns(f"{name}.self_attn.o_proj"))
        gate_up = [rows(f"{name}.mlp.{x}_proj") for x in ("gate", "up")]
        block.gate_up.weight.copy_(torch.cat(gate_up))
        block.down.weight.copy_(columns(f"{name}.mlp.down_proj"))
        block.input_norm.weight.copy_(whole[f"{name}.input_layernorm.weight"])
        block.mlp_norm.weight.copy_(whole[f"{name}.post_attention_layernorm.weight"])
