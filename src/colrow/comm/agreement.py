"""Numbers that all ranks of a group must agree on, compared before a wrong result can follow."""

from __future__ import annotations

import torch
from torch import Tensor

from colrow import rng
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup

# Bytes that CUDA's _assert_async takes, which has room for 256 (TensorCompare.cu).
_LONGEST_MESSAGE = 254
NEAR = 2e-3


def require_same(
    value: int | Tensor,
    tp: ParallelGroup,
    message: str,
    *,
    layer: str,
    device: torch.device,
    near: Tensor | None = None,
) -> None:
    """Raises on every rank when the ranks hold different values.

    Sends one all-reduce of 16 bytes: the maxima of a hash and of its negative, which are equal and
    opposite only if all hashes are. Does nothing with one rank, on meta, and inside torch.compile.

    Args:
        value: an int64, as a number or a 0-d tensor.
        message: of the error; says what the user should do.
        layer: name for the ledger.
        device: where the hashes are compared. On CUDA the device asserts the result, since
            reading it here would stall.
        near: a 0-d number in fp64, not negative, that may differ by :data:`NEAR` of its size, since
            unlike machines round differently. Its bits and their negative are sent too, as 16 bytes
            more: they are in the order of the numbers.

    Raises:
        ValueError: with ``message``.
    """
    if tp.size == 1 or torch.compiler.is_compiling():
        return
    index = torch.zeros((), dtype=torch.int64, device=device)
    digest = rng.bits(value, index) >> 1  # the negative of the smallest int64 does not exist
    numbers = [digest, -digest]
    if near is not None:
        bits = near.detach().abs().view(torch.int64)
        numbers += [bits, -bits]
    extremes = primitives.all_reduce(torch.stack(numbers), tp, op="max", layer=layer, in_place=True)
    if extremes.is_meta:
        return
    same = extremes[0] == -extremes[1]
    if near is not None:
        most, least = extremes[2:3].view(torch.float64), (-extremes[3:4]).view(torch.float64)
        same = same & ((extremes[2] == -extremes[3]) | (most - least <= NEAR * most)[0])
    if extremes.is_cuda:
        assert_on_device(same, message)
    elif not same:
        raise ValueError(message)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Ends the process with ``message`` where a 0-d bool of a GPU is False, some time later.

    The message is cut to what CUDA's assertion takes: torch refuses a longer one at once, whatever
    the condition is.
    """
    short = message.encode()[:_LONGEST_MESSAGE].decode(errors="ignore")
    torch._assert_async(condition, short)


def common_seed(what: str, tp: ParallelGroup, *, layer: str, device: torch.device) -> int:
    """A seed from torch's CPU generator, which all ranks of the group must have seeded alike.

    Args:
        what: what is drawn with it, for the message.
        layer, device: as in :func:`require_same`, which this calls.

    Raises:
        ValueError: when the ranks' generators differ.
    """
    seed = rng.draw_seed()
    require_same(seed, tp, different_seeds(what, tp), layer=layer, device=device)
    return seed


def different_seeds(what: str, tp: ParallelGroup) -> str:
    """The message for generators that differ."""
    return (
        f"the {tp.size} ranks of this {tp.name} group would draw different {what}: their torch CPU "
        f"generators differ; call torch.manual_seed with the same number on all {tp.name} ranks "
        "before it, and draw equally much from it on each (different seeds only for different dp "
        "ranks)"
    )
