"""The time of one collective, for the ledger; only runs while somebody records."""

from __future__ import annotations

import time

import torch

from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call, Phase


class Clock:
    """From the issue of a collective over the moment a rank waits for it to its completion.

    On CUDA the three moments are events on the rank's stream, so that nothing is made to wait while
    the work runs; their times are read when the ledger is.
    """

    def __init__(self, tp: ParallelGroup, call: Call, device: torch.device) -> None:
        self._tp, self._call, self._device = tp, call, device
        self._started = self._waited = self._now()
        self._issuing_seconds = 0.0

    @staticmethod
    def start(
        op: str, buffer: torch.Tensor, tp: ParallelGroup, layer: str, phase: Phase
    ) -> Clock | None:
        """Begins to time a collective on ``buffer``; None when nobody records."""
        if tp.ledger is None:
            return None
        size = buffer.numel() * buffer.element_size()
        dtype = str(buffer.dtype).removeprefix("torch.")
        return Clock(tp, Call(op, phase, layer, size, dtype, tp.name), buffer.device)

    def issued(self) -> None:
        """The call that starts the collective is over; an engine may have done the work in it."""
        if isinstance(self._started, float):
            self._issuing_seconds = time.perf_counter() - self._started

    def blocked(self) -> None:
        """The rank has nothing else to do from here on."""
        self._waited = self._now()

    def done(self) -> None:
        """The rank goes on; writes the entry."""
        started, waited, ended = self._started, self._waited, self._now()
        issuing = self._issuing_seconds
        if self._tp.ledger is not None:
            self._tp.ledger.add(
                self._call, lambda: (_seconds(started, ended), issuing + _seconds(waited, ended))
            )

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float) and isinstance(last, float)
        return last - first
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1000
