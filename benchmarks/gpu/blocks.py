"""One rank's share of a transformer block, forward and backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.gpu.plain import PlainBlock
from benchmarks.gpu.shapes import Share, group
from benchmarks.gpu.timing import Phases, Timer, Times
from colrow.layers.block import ParallelBlock
from colrow.models.build import from_config

_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def measure(
    share: Share, timer: Timer, dtype: torch.dtype, ceiling: float, *, compiled: bool
) -> dict[str, object]:
    """colrow's block and the plain one, eager and by torch.compile, in turns.

    Args:
        ceiling: TFLOP/s of the fastest matmul.
        compiled: whether torch.compile takes part.

    Raises:
        RuntimeError: when the two compute something else.
    """
    block = colrow_block(share, timer.device, dtype)
    plain = PlainBlock(share, timer.device, dtype)
    plain.take_weights(block)
    shape = (share.batch, share.sequence, share.config.hidden_size)
    x = torch.randn(shape, device=timer.device, dtype=dtype).requires_grad_()
    difference = _difference(block, plain, x)
    if not difference <= _TOLERANCE[dtype]:
        raise RuntimeError(f"{share.label}: colrow and plain differ by {difference:.1e}")
    contestants = {"colrow": step(block, x), "plain": step(plain, x)}
    if compiled:
        torch.compiler.reset()  # else the next model's sizes would be compiled as variables
        for name, module in (("colrow", block), ("plain", plain)):
            contestants[f"{name}, compiled"] = step(torch.compile(module, dynamic=False), x)
    return {
        "share": share.label,
        "dtype": str(dtype).removeprefix("torch."),
        "forward_flops": share.block_flops,
        "relative_difference": difference,
        "contestants": {
            name: _summary(times, share, ceiling) for name, times in timer.race(contestants).items()
        },
    }


def colrow_block(share: Share, device: torch.device, dtype: torch.dtype) -> ParallelBlock:
    """The first block of the model; the rest of it would only take memory."""
    config = replace(
        share.config,
        blocks=share.config.blocks[:1],
        vocab_size=share.ranks,
        pad_token_id=None,
        freeze_padding=False,
    )
    block = from_config(config, group(share.ranks), device=device, dtype=dtype).blocks[0]
    assert isinstance(block, ParallelBlock)
    return block


def step(module: Callable[[Tensor], Tensor], x: Tensor) -> Phases:
    """Forward, and backward into the input and every parameter."""
    outputs: list[Tensor] = []
    gradient = torch.randn_like(x)

    def forward() -> None:
        outputs[:] = [module(x)]

    def backward() -> None:
        x.grad = None
        if isinstance(module, nn.Module):
            module.zero_grad()
        outputs.pop().backward(gradient)

    return {"forward": forward, "backward": backward}


def _difference(block: nn.Module, plain: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        mine, theirs = block(x).float() - x.float(), plain(x).float() - x.float()
    return float((mine - theirs).norm() / theirs.norm())


def _summary(times: Times, share: Share, ceiling: float) -> dict[str, object]:
    """Backward has twice the multiplications of forward."""
    found: dict[str, object] = {"problem": times.problem, "peak_bytes": times.peak_bytes}
    for phase, factor in (("forward", 1), ("backward", 2)):
        samples = times.seconds.get(phase)
        if samples:
            teraflops = factor * share.block_flops / statistics.median(samples) / 1e12
            found[phase] = {
                "seconds": samples,
                "teraflops": teraflops,
                "fraction_of_ceiling": teraflops / ceiling,
            }
    return found
