"""PyTorch's own tensor parallelism: parallelize_module on the plain decoder, with loss_parallel.

The plans are those of PyTorch's tensor-parallelism tutorial.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.peers.training import Unsplit


class DTensor(Unsplit):
    """Colwise and rowwise linears, a rowwise embedding, the head's logits sharded."""

    def build(self, directory: Path) -> nn.Module:
        model = super().build(directory)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.model.layers:
            parallelize_module(block, mesh, self.block_plan())
        return parallelize_module(model, mesh, self.outer_plan())

    def block_plan(self) -> dict[str, ParallelStyle]:
        """For each block."""
        column = [f"self_attn.{x}_proj" for x in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
        row = ["self_attn.o_proj", "mlp.down_proj"]
        return {
            **{name: ColwiseParallel() for name in column},
            **{name: RowwiseParallel() for name in row},
        }

    def outer_plan(self) -> dict[str, ParallelStyle]:
        """For what surrounds the blocks."""
        return {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }

    def around_backward(self) -> AbstractContextManager[object]:
        return loss_parallel()

    def loss(self) -> Tensor:
        logits = self.model(self.ids)
        return F.cross_entropy(logits.flatten(0, 1), self.labels.flatten())


class DTensorSequenceParallel(DTensor):
    """With norms and residuals on a shard of the sequence."""

    def block_plan(self) -> dict[str, ParallelStyle]:
        whole = {"desired_input_layouts": (Replicate(), None)}
        return {
            **super().block_plan(),
            "input_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(input_layouts=(Shard(1), None), **whole),
            "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
            "post_attention_layernorm": SequenceParallel(),
            "mlp": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            ),
            "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        }

    def outer_plan(self) -> dict[str, ParallelStyle]:
        return {
            "model.embed_tokens": RowwiseParallel(
                input_layouts=Replicate(), output_layouts=Shard(1)
            ),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(
                input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
            ),
        }
