"""A model made ready for training: number formats, recomputation, data parallelism."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from colrow.comm.mesh import Mesh
from colrow.layers.block import prepare_blocks
from colrow.layers.memory_saving import Recompute, cast_parameters
from colrow.models.interface import TensorParallelModel
from colrow.shards.over_dp import shard_over_dp
from colrow.train.foreign_blocks import prepare_foreign_blocks


class BlockTraining(TypedDict):
    """How blocks run in training, see :func:`colrow.layers.block.prepare_blocks`."""

    sharded: bool
    compute_dtype: torch.dtype | None
    recompute: Recompute


class SummedLoss(nn.Module):
    """The loss of a model, summed over tokens, as a module: what DDP and FSDP2 wrap.

    Args:
        model: whose parameters it has, as ``module``.
        compute_dtype: matmuls and activations have this dtype, while the parameters, and so their
            gradients and the optimiser, keep their own; None leaves everything as it is.
        label_smoothing, z_loss: of the loss.
    """

    def __init__(
        self,
        model: TensorParallelModel,
        *,
        compute_dtype: torch.dtype | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.module, self.compute_dtype = model.module, compute_dtype
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self._loss, self._arithmetic = model.loss, model.arithmetic
        self._has_routers = model.description.kind == "decoder"
        inside = {id(m) for block in model.blocks for m in block.modules()}
        self._outside = [m for m in model.module.modules() if id(m) not in inside]

    def forward(self, input_ids: Tensor, labels: Tensor, dropout_key: int | None = None) -> Tensor:
        """The sum over the tokens that count; ``[batch, sequence]`` ids and labels.

        In evaluation mode without label smoothing, z-loss and losses of routers.
        """
        further: dict[str, Any] = {}
        if self._has_routers and not self.training:
            further["router_losses"] = False
        with cast_parameters(self._outside, self.compute_dtype), self._arithmetic():
            return self._loss(
                input_ids,
                labels,
                label_smoothing=self.label_smoothing if self.training else 0.0,
                z_loss=self.z_loss if self.training else 0.0,
                reduction="sum",
                dropout_key=dropout_key,
                **further,
            )


def parallelize(
    model: TensorParallelModel,
    mesh: Mesh,
    *,
    fsdp: bool = False,
    compute_dtype: torch.dtype | None = None,
    recompute: Recompute = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> nn.Module:
    """The module to call in a training step; ``model`` keeps the parameters and their names.

    Args:
        fsdp: divide parameters, gradients and optimiser state over the dp ranks (FSDP2: Zhao et al.
            2023), block by block; otherwise every dp rank holds all of its tp shard (DDP). Both
            divide plain local tensors, so shards that are uneven under tp stay right.
        compute_dtype: see :class:`SummedLoss`. Gradients are reduced over dp in the parameters'
            dtype.
        recompute: "full" keeps only each block's input for backward (Chen et al. 2016),
            "selective" recomputes the attention between the projections (Korthikanti et al. 2022,
            section 5), "none" keeps everything.

    Raises:
        ValueError: what a model that was split in place cannot do, such as selective recomputation.

    Communicates: DDP compares and broadcasts the initial parameters over dp; all ranks call it.
    """
    sharded = fsdp and mesh.dp.size > 1
    options: BlockTraining = {
        "sharded": sharded,
        "compute_dtype": compute_dtype,
        "recompute": recompute,
    }
    if model.description.kind == "decoder":
        prepare_blocks(model.blocks, **options)
    else:
        prepare_foreign_blocks(model.blocks, model.arithmetic, **options)
    loss = SummedLoss(
        model,
        compute_dtype=None if sharded else compute_dtype,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    if sharded:
        shard_over_dp([*model.blocks, loss], mesh, compute_dtype)
        return loss
    if mesh.dp.size == 1:
        return loss
    # Buffers are functions of the configuration; torch 2.13 has another name for not sending them.
    known = inspect.signature(DistributedDataParallel).parameters
    still = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    ddp: dict[str, Any] = {still: False}
    if model.description.kind == "in place":  # which experts get tokens differs between dp ranks
        ddp["find_unused_parameters"] = True
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    return DistributedDataParallel(
        loss, process_group=mesh.dp.group, gradient_as_bucket_view=True, **ddp
    )
