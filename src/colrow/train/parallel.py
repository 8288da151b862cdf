"""A model made ready for training: number formats, recomputation, data parallelism."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from colrow.comm.mesh import Mesh
from colrow.layers.block import ParallelBlock
from colrow.models.interface import TensorParallelModel

Recompute = Literal["none", "selective", "full"]
NO_SELECTIVE = (
    "recompute=selective knows the attention of the described families only, and this model is "
    "split in place: use recompute=full"
)


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
        inside = {id(m) for block in model.blocks for m in block.modules()}
        self._outside = [m for m in model.module.modules() if id(m) not in inside]

    def forward(self, input_ids: Tensor, labels: Tensor, dropout_key: int | None = None) -> Tensor:
        """The sum over the tokens that count; ``[batch, sequence]`` ids and labels.

        In evaluation mode without label smoothing and z-loss.
        """
        with cast_parameters(self._outside, self.compute_dtype), self._arithmetic():
            return self._loss(
                input_ids,
                labels,
                label_smoothing=self.label_smoothing if self.training else 0.0,
                z_loss=self.z_loss if self.training else 0.0,
                reduction="sum",
                dropout_key=dropout_key,
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
    prepare_blocks(model, sharded=sharded, compute_dtype=compute_dtype, recompute=recompute)
    loss = SummedLoss(
        model,
        compute_dtype=None if sharded else compute_dtype,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    if sharded:
        return _fully_shard(loss, model.blocks, mesh, compute_dtype)
    if mesh.dp.size == 1:
        return loss
    # Buffers are functions of the configuration; torch 2.13 has another name for not sending them.
    known = inspect.signature(DistributedDataParallel).parameters
    still = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {still: False}
    if model.description.kind == "in place":  # which experts get tokens differs between dp ranks
        options["find_unused_parameters"] = True
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    return DistributedDataParallel(
        loss, process_group=mesh.dp.group, gradient_as_bucket_view=True, **options
    )


def prepare_blocks(
    model: TensorParallelModel,
    *,
    sharded: bool,
    compute_dtype: torch.dtype | None,
    recompute: Recompute,
) -> None:
    """Gives the blocks their number format and recomputation; arguments as for parallelize.

    ``sharded``: FSDP2 swaps their parameters while they run, and casts them itself.
    """
    for block in model.blocks:
        if isinstance(block, ParallelBlock):
            block.own_bucket = sharded or compute_dtype is not None
        else:
            _check_in_place(block, sharded=sharded, recompute=recompute)
        forward: Callable[..., Tensor] = block.forward
        if compute_dtype is not None and not sharded:
            forward = _with_dtype(block, forward, compute_dtype)
        if recompute == "full":
            forward = _recomputed(
                forward, model.arithmetic, draws=model.description.kind == "in place"
            )
        block.forward = forward
        if recompute == "selective" and isinstance(block, ParallelBlock):
            attention = block.attention
            attention._attend = _recomputed(attention._attend)  # type: ignore[method-assign]
            attention._attend_with_dropout = _recomputed(  # type: ignore[method-assign]
                attention._attend_with_dropout
            )


def _check_in_place(block: nn.Module, *, sharded: bool, recompute: Recompute) -> None:
    """Raises ValueError for what a block of transformers' code cannot do."""
    if recompute == "selective":
        raise ValueError(NO_SELECTIVE)
    if sharded and any(isinstance(module, nn.ModuleList) for module in block.modules()):
        raise ValueError(
            f"fsdp: {type(block).__name__} has a list of modules (experts, say), of which ranks "
            "with other tokens may use others, and FSDP2 would wait for ever: leave --fsdp out"
        )


def _fully_shard(
    loss: SummedLoss, blocks: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype | None
) -> nn.Module:
    assert mesh.device_mesh is not None
    dp = mesh.device_mesh["dp"]
    wide = next(loss.parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=wide)
    for block in blocks:
        fully_shard(block, mesh=dp, mp_policy=policy)
    fully_shard(loss, mesh=dp, mp_policy=policy)
    return loss


@contextmanager
def cast_parameters(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside it, these modules' own parameters are their casts; gradients flow to the originals.

    Parameters that have the dtype stay. A parameter that two modules share is cast once.
    """
    swapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    casts: dict[int, Tensor] = {}
    try:
        for module in modules if dtype else ():
            parameters: dict[str, Any] = module._parameters
            for name, parameter in list(parameters.items()):
                if parameter is not None and parameter.dtype != dtype:
                    cast = casts.setdefault(id(parameter), parameter.to(dtype))
                    swapped.append((parameters, name, parameter))
                    parameters[name] = cast
        yield
    finally:
        for parameters, name, parameter in swapped:
            parameters[name] = parameter


def _with_dtype(
    module: nn.Module, forward: Callable[..., Tensor], dtype: torch.dtype
) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        with cast_parameters(module.modules(), dtype):
            return forward(*args, **kwargs)

    return run


def _recomputed(
    forward: Callable[..., Tensor],
    arithmetic: Callable[[], AbstractContextManager[object]] = nullcontext,
    *,
    draws: bool = False,
) -> Callable[..., Tensor]:
    """Keeps the inputs instead of the intermediate results.

    Args:
        arithmetic: inside what the results are computed, the second time too.
        draws: dropout takes torch's random numbers, which are then those of the first time; the
            decoder's masks are addressed by key.
    """

    def once(*args: Any, **kwargs: Any) -> Tensor:
        with arithmetic():
            return forward(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        result: Tensor = checkpoint(
            once, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs
        )
        return result

    return run
