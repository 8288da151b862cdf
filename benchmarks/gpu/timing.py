"""Contestants in turns, each phase between two events of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

# More than any L2 cache: what a sample reads first comes from memory.
_FLUSH_BYTES = 256 << 20
_WARM_UP = 3

Phases = Mapping[str, Callable[[], object]]


@dataclass
class Times:
    """Of one contestant.

    Attributes:
        seconds: samples by phase.
        peak_bytes: most memory above what was there before its warm-up; None on a CPU.
        problem: why it was not timed.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    problem: str = ""


class Timer:
    """Times on one device.

    Args:
        turns: samples of each contestant.
        flush: whether the L2 cache is emptied before each sample.
    """

    def __init__(self, device: torch.device, turns: int, *, flush: bool = True) -> None:
        self.device, self.turns = device, turns
        cuda = device.type == "cuda"
        size = _FLUSH_BYTES if cuda and flush else 0
        self._flush: Tensor | None = (
            torch.empty(size, dtype=torch.int8, device=device) if size else None
        )
        self._moment = _event if cuda else time.perf_counter

    def race(self, contestants: Mapping[str, Phases]) -> dict[str, Times]:
        """Every contestant, in turns: A B C, B C A, C A B.

        One that fails in its warm-up, for want of memory or because it does not compile, is left
        out with the reason.
        """
        found = {name: self._warm_up(phases) for name, phases in contestants.items()}
        ready = [name for name, times in found.items() if not times.problem]
        for turn in range(self.turns):
            first = turn % max(1, len(ready))
            for name in ready[first:] + ready[:first]:
                for phase, seconds in self._sample(contestants[name]).items():
                    found[name].seconds.setdefault(phase, []).append(seconds)
        return found

    def _warm_up(self, phases: Phases) -> Times:
        times = Times()
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        try:
            for _ in range(_WARM_UP):
                if cuda:  # the last one counts: the first compiles, and makes workspaces
                    torch.cuda.reset_peak_memory_stats(self.device)
                self._sample(phases)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            times.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if cuda and not times.problem:
            times.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before
        return times

    def _sample(self, phases: Phases) -> dict[str, float]:
        if self._flush is not None:
            self._flush.zero_()
        moments: list[object] = [self._moment()]
        for call in phases.values():
            call()
            moments.append(self._moment())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return dict(zip(phases, _differences(moments), strict=True))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _differences(moments: Sequence[object]) -> list[float]:
    found = []
    for first, last in pairwise(moments):
        if isinstance(first, float) and isinstance(last, float):
            found.append(last - first)
        else:
            assert isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event)
            found.append(first.elapsed_time(last) / 1e3)
    return found
