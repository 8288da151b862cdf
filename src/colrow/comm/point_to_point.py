"""Messages between two ranks, and from each rank to each: no autograd, any shape, counted.

As the collectives of :mod:`colrow.comm.primitives`: each has an asynchronous form, and a ledger
that is attached to the group sees it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.comm.clock import Clock
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Phase
from colrow.comm.primitives import Pending


def all_to_all(
    pieces: list[Tensor],
    sizes: list[int],
    tp: ParallelGroup,
    *,
    layer: str = "",
    phase: Phase = "forward",
) -> list[Tensor]:
    """A message from each rank to each; of any sizes, also none.

    Args:
        pieces: one-dimensional, of one dtype: what goes to rank 0, 1, and so on.
        sizes: how many elements come from each.

    Returns:
        What came from each rank.
    """
    if tp.size == 1:
        return pieces
    sent = torch.cat(pieces)
    clock = Clock.start("all_to_all", sent, tp, layer, phase)
    width, device = sent.element_size(), sent.device
    raw = sent.view(torch.uint8)  # not every engine knows every dtype, and here they are only bytes
    raw = raw.cpu() if _through_host(sent, tp) else raw
    got = raw.new_empty(sum(sizes) * width)
    arriving = [n * width for n in sizes]
    leaving = [piece.numel() * width for piece in pieces]
    dist.all_to_all_single(got, raw, arriving, leaving, group=tp.group)
    if clock is not None:
        clock.issued()
        clock.blocked()
        clock.done()
    return list(got.to(device).view(sent.dtype).split(sizes))


def send(
    x: Tensor, tp: ParallelGroup, to: int, *, layer: str = "", phase: Phase = "forward"
) -> None:
    """Sends ``x`` to the rank ``to`` of the group, which must receive it."""
    send_async(x, tp, to, layer=layer, phase=phase).wait()


def send_async(
    x: Tensor, tp: ParallelGroup, to: int, *, layer: str = "", phase: Phase = "forward"
) -> Pending:
    """As :func:`send`. The result is ``x``, which must not be written to before."""
    _check_peer(to, tp, "send to")
    message = x.cpu().contiguous() if _through_host(x, tp) else x.contiguous()
    clock = Clock.start("send", message, tp, layer, phase)
    work = dist.isend(message, group=tp.group, group_dst=to)
    held = x, message  # which must not go while it is under way
    return Pending(lambda: held[0], work, clock)


def recv(
    buffer: Tensor, tp: ParallelGroup, source: int, *, layer: str = "", phase: Phase = "forward"
) -> Tensor:
    """Fills ``buffer``, a contiguous tensor of the message's shape and dtype, and returns it.

    Args:
        source: the rank of the group that sends.
    """
    return recv_async(buffer, tp, source, layer=layer, phase=phase).wait()


def recv_async(
    buffer: Tensor, tp: ParallelGroup, source: int, *, layer: str = "", phase: Phase = "forward"
) -> Pending:
    """As :func:`recv`."""
    _check_peer(source, tp, "receive from")
    clock = Clock.start("recv", buffer, tp, layer, phase)
    if not _through_host(buffer, tp):
        work = dist.irecv(buffer, group=tp.group, group_src=source)
        return Pending(lambda: buffer, work, clock)
    message = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    work = dist.irecv(message, group=tp.group, group_src=source)
    return Pending(lambda: buffer.copy_(message), work, clock)


def _through_host(x: Tensor, tp: ParallelGroup) -> bool:
    """Gloo gives the address of a message to the kernel, which knows no GPU's memory."""
    return tp.cuda_by_gloo and x.is_cuda


def _check_peer(peer: int, tp: ParallelGroup, what: str) -> None:
    if not 0 <= peer < tp.size or peer == tp.rank:
        raise ValueError(
            f"{tp.name} rank {tp.rank} cannot {what} rank {peer}: it must be another one of the "
            f"group's ranks 0 to {tp.size - 1}"
        )
