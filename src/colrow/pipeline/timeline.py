"""A step of a pipeline as it ran: what every rank did when, and why it waited. No torch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from colrow.pipeline.schedules import (
    KINDS,
    Action,
    Kind,
    Span,
    bubble_fraction,
    most_in_flight,
    simulate,
)


@dataclass(frozen=True)
class Wait:
    """A time in which a rank computed nothing, during the step.

    Attributes:
        start, end: in seconds since the step began.
        arrived: from here on what the rank waited for was ready on the other rank: until then it
            was idle, after that it waited for communication.
    """

    start: float
    arrived: float
    end: float

    @property
    def idle(self) -> float:
        """Seconds in which there was nothing to do."""
        return self.arrived - self.start

    @property
    def communication(self) -> float:
        """Seconds in which a message was under way, or an engine was slow to hand it over."""
        return self.end - self.arrived


@dataclass(frozen=True)
class RankTime:
    """Where a rank's time went, in seconds; together they are the step.

    Attributes:
        forward: computing forward.
        backward: computing backward, where the schedule does both parts at once.
        input, weight: its parts, where they are apart.
        communication: waiting for collectives inside these, or for messages between them.
        idle: waiting for other ranks: the bubble.
        microbatches_in_flight: the most microbatches whose activations were kept at once.
    """

    forward: float
    backward: float
    input: float
    weight: float
    communication: float
    idle: float
    microbatches_in_flight: int


@dataclass(frozen=True)
class Timeline:
    """One step on all ranks of a pipeline, on one clock that begins with the step.

    Attributes:
        ranks: what each rank did, in order.
        seconds: from the first rank's first action to the end of the last action.
    """

    ranks: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        """From the first action of any rank to the last one's end."""
        return max(s.end for rank in self.ranks for s in rank) - self.start

    @property
    def start(self) -> float:
        """When the first action began."""
        return min(s.start for rank in self.ranks for s in rank)

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time in which they computed nothing, messages included."""
        return bubble_fraction(self.ranks)

    def waits(self, rank: int) -> list[Wait]:
        """The times between this rank's actions, before them and after them."""
        ends = {span.action: span.end for spans in self.ranks for span in spans}
        mine = {span.action for span in self.ranks[rank]}
        last = max(action.stage for action in ends)
        before, found = self.start, []
        for span in self.ranks[rank]:
            source = _source(span.action, last, ends)
            sent = span.start if source is None or source in mine else ends[source]
            if span.start > before:
                found.append(Wait(before, min(max(before, sent), span.start), span.start))
            before = max(before, span.end)
        end = self.start + self.seconds
        return [*found, Wait(before, end, end)] if end > before else found

    def time(self, rank: int) -> RankTime:
        """Where the time of a rank went."""
        spans, waits = self.ranks[rank], self.waits(rank)
        by_kind: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        for span in spans:
            by_kind[span.action.kind] += span.seconds - span.communication
        inside = sum(span.communication for span in spans)
        return RankTime(
            **by_kind,
            communication=inside + sum(wait.communication for wait in waits),
            idle=sum(wait.idle for wait in waits),
            microbatches_in_flight=most_in_flight([span.action for span in spans]),
        )

    def ideal(self) -> Timeline:
        """The same order of actions, each with its stage's median time, if messages took none.

        What is left of the bubble in it is the schedule's own, and that of stages of unequal cost.
        """
        seconds: dict[tuple[int, Kind], list[float]] = defaultdict(list)
        for spans in self.ranks:
            for span in spans:
                seconds[span.action.stage, span.action.kind].append(span.seconds)
        typical = {key: median(values) for key, values in seconds.items()}
        order = [[span.action for span in spans] for spans in self.ranks]
        found = simulate(order, lambda action: typical[action.stage, action.kind])
        return Timeline(tuple(tuple(spans) for spans in found))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seconds": self.seconds,
            "bubble_fraction": self.bubble_fraction,
            "ranks": [
                {
                    **asdict(self.time(rank)),
                    "actions": [
                        {
                            **asdict(span.action),
                            "start": span.start - self.start,
                            "end": span.end - self.start,
                            "communication": span.communication,
                        }
                        for span in spans
                    ],
                }
                for rank, spans in enumerate(self.ranks)
            ],
        }


def _source(action: Action, last: int, ends: dict[Action, float]) -> Action | None:
    """Whose result the action takes; None when it is its own stage's or the batch."""
    if action.kind == "forward" and action.stage > 0:
        return Action(action.stage - 1, "forward", action.microbatch)
    if action.kind in ("backward", "input") and action.stage < last:
        whole = Action(action.stage + 1, "backward", action.microbatch)
        return whole if whole in ends else Action(action.stage + 1, "input", action.microbatch)
    return None
