"""Recording a step of ``torch.distributed.pipelining``: when each rank ran which part of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.comm import point_to_point
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Ledger, record
from colrow.pipeline.schedules import Action, Kind, Span
from colrow.pipeline.timeline import Timeline

_PINGS = 10
Moment = float | torch.cuda.Event


class Recording:
    """What this rank did in a step; filled by :func:`record_step`."""

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        self._device, self._ledger = device, ledger
        self._taken: list[tuple[Action, Moment, Moment, int, int]] = []
        self._offset = 0.0
        if device.type == "cuda":
            self._base = self.now()
            torch.cuda.synchronize(device)
            self._offset = time.perf_counter()

    def now(self) -> Moment:
        """This moment; on CUDA that at which the rank's stream gets there."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Notes that the block is this action, and which collectives it waited for."""
        calls, start = len(self._ledger.calls), self.now()
        yield
        self._taken.append((action, start, self.now(), calls, len(self._ledger.calls)))

    @contextmanager
    def longer(self) -> Iterator[None]:
        """Counts the block to the action before it."""
        yield
        if self._taken:
            action, start, _, calls, _ = self._taken.pop()
            self._taken.append((action, start, self.now(), calls, len(self._ledger.calls)))

    def spans(self) -> list[Span]:
        """This rank's actions, by its own ``time.perf_counter``."""
        entries = self._ledger.entries
        return [
            Span(
                action,
                self._seconds(start),
                self._seconds(end),
                sum(entry.exposed_seconds for entry in entries[first:last]),
            )
            for action, start, end, first, last in self._taken
        ]

    def gather(self, pp: ParallelGroup) -> Timeline:
        """The step on all ranks of the pipeline; on CUDA this waits for the device.

        Ranks of other hosts have other clocks. Each rank asks the first one for the time and halves
        the way of the fastest answer (Cristian 1989).

        Communicates: 10 messages of 8 bytes each way between the first rank and every other, and
        the recorded actions; all ranks of the pipeline call it.
        """
        mine = self.spans()
        if pp.size == 1:
            return _from_zero([mine])
        offset = clock_offset(pp, self._device)
        mine = [Span(s.action, s.start - offset, s.end - offset, s.communication) for s in mine]
        everyone: list[list[Span]] = [[] for _ in range(pp.size)]
        dist.all_gather_object(everyone, mine, group=pp.group)
        return _from_zero(everyone)

    def _seconds(self, moment: Moment) -> float:
        if isinstance(moment, float):
            return moment
        assert isinstance(self._base, torch.cuda.Event)
        moment.synchronize()
        since: float = self._base.elapsed_time(moment)
        return self._offset + since / 1000


@contextmanager
def record_step(
    schedule: Any, stages: Sequence[Any], *groups: ParallelGroup, device: torch.device
) -> Iterator[Recording]:
    """Records what this rank does while the block runs, which is one ``schedule.step(...)``.

    Args:
        schedule: of ``torch.distributed.pipelining``; its loss counts as the last stage's forward.
        stages: this rank's ``PipelineStage``s, which the schedule was given.
        groups: those whose collectives run inside a stage, such as ``mesh.tp`` and ``mesh.dp``: the
            time that the rank waits for them is communication.
        device: where the stages compute.

    A schedule's first step also finds out the shapes that the stages send, unless they were told:
    take a step before one that is recorded.
    """
    with ExitStack() as stack:
        found = Recording(device, stack.enter_context(record(*groups)))
        for stage in stages:
            forward, backward = stage.forward_one_chunk, stage.backward_one_chunk
            _replace(stack, stage, "forward_one_chunk", _timed(found, stage, forward, "forward"))
            _replace(stack, stage, "backward_one_chunk", _timed_backward(found, stage, backward))
            weight = stage.backward_weight_one_chunk
            name = "backward_weight_one_chunk"
            _replace(stack, stage, name, _timed(found, stage, weight, "weight"))
        loss = schedule._loss_fn
        if loss is not None:

            def timed_loss(*args: Any, **kwargs: Any) -> Tensor:
                with found.longer():
                    result: Tensor = loss(*args, **kwargs)
                return result

            _replace(stack, schedule, "_loss_fn", timed_loss)
        yield found


def clock_offset(pp: ParallelGroup, device: torch.device) -> float:
    """How many seconds this rank's ``time.perf_counter`` is ahead of the first rank's.

    Communicates: see :meth:`Recording.gather`.
    """
    cell = torch.zeros(1, dtype=torch.float64, device=device)
    if pp.rank == 0:
        for other in range(1, pp.size):
            for _ in range(_PINGS):
                point_to_point.recv(cell, pp, other, layer="clock")
                point_to_point.send(cell.fill_(time.perf_counter()), pp, other, layer="clock")
        return 0.0
    best, offset = float("inf"), 0.0
    for _ in range(_PINGS):
        asked = time.perf_counter()
        point_to_point.send(cell, pp, 0, layer="clock")
        theirs = point_to_point.recv(cell, pp, 0, layer="clock").item()
        answered = time.perf_counter()
        if answered - asked < best:
            best, offset = answered - asked, (asked + answered) / 2 - theirs
    return offset


def _timed(
    found: Recording, stage: Any, function: Callable[..., Any], kind: Kind
) -> Callable[..., Any]:
    def run(microbatch: int, *args: Any, **kwargs: Any) -> Any:
        with found.span(Action(stage.stage_index, kind, microbatch)):
            return function(microbatch, *args, **kwargs)

    return run


def _timed_backward(
    found: Recording, stage: Any, function: Callable[..., Any]
) -> Callable[..., Any]:
    def run(
        microbatch: int, *args: Any, full_backward: bool = True, **kwargs: Any
    ) -> Any:  # torch's schedules name the argument
        kind: Kind = "backward" if full_backward else "input"
        with found.span(Action(stage.stage_index, kind, microbatch)):
            return function(microbatch, *args, full_backward=full_backward, **kwargs)

    return run


def _replace(stack: ExitStack, owner: Any, name: str, value: object) -> None:
    """Sets an attribute of this object until the stack unwinds."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    if before is missing:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)


def _from_zero(everyone: Sequence[Sequence[Span]]) -> Timeline:
    zero = min(span.start for spans in everyone for span in spans)
    return Timeline(
        tuple(
            tuple(Span(s.action, s.start - zero, s.end - zero, s.communication) for s in spans)
            for spans in everyone
        )
    )
