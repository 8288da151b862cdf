"""Pipeline schedules on paper: orders timed without communication, and bubbles in closed form.

The orders themselves are those of ``torch.distributed.pipelining``. Plain Python, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward", "input", "weight"]
# "backward" is both parts at once; zero-bubble schedules compute the gradient of the input first.
KINDS: tuple[Kind, ...] = ("forward", "backward", "input", "weight")

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"]
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zero-bubble", "zbv")


@dataclass(frozen=True)
class Action:
    """What a rank does next: one microbatch through one stage, one way.

    Attributes:
        stage: number of the stage among all; with several stages a rank, not the rank's number.
        kind: "forward"; "backward", or its parts "input" (gradient) and "weight" (gradients).
        microbatch: its number in the step.
    """

    stage: int
    kind: Kind
    microbatch: int


@dataclass(frozen=True)
class Span:
    """An action and when it ran.

    Attributes:
        action: what.
        start, end: in seconds since the step began.
        communication: seconds inside it in which the rank only waited for collectives.
    """

    action: Action
    start: float
    end: float
    communication: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


Cost = Callable[[Action], float]


def simulate(order: Sequence[Sequence[Action]], cost: Cost) -> list[list[Span]]:
    """Each rank's actions, each as early as the order and what it needs allow.

    A forward needs the stage before it; the gradient of an input needs the stage behind it, on the
    last stage the forward; weight gradients need the gradient of the same stage's input. Messages
    take no time, and nobody waits for a message to be taken.

    Args:
        order: by rank, what it does in which order.
        cost: seconds of an action.

    Raises:
        ValueError: an order that waits for itself, or for an action that nobody does.
    """
    last = max(action.stage for actions in order for action in actions)
    done: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in order]
    progress = True
    while progress:
        progress = False
        for actions, found in zip(order, spans, strict=True):
            while len(found) < len(actions):
                action = actions[len(found)]
                ready = _ready(action, last, done)
                if ready is None:
                    break
                start = max(ready, found[-1].end if found else 0.0)
                found.append(Span(action, start, start + cost(action)))
                done[action] = found[-1].end
                progress = True
    for rank, (actions, found) in enumerate(zip(order, spans, strict=True)):
        if len(found) < len(actions):
            raise ValueError(
                f"rank {rank} waits for ever before {actions[len(found)]}: what that needs is done "
                "later or by nobody"
            )
    return spans


def _ready(action: Action, last: int, done: Mapping[Action, float]) -> float | None:
    """When what the action needs is there; None while it is not."""
    stage, kind, microbatch = action.stage, action.kind, action.microbatch
    if kind == "forward":
        return 0.0 if stage == 0 else done.get(Action(stage - 1, "forward", microbatch))
    if kind == "weight":
        return done.get(Action(stage, "input", microbatch))
    if stage == last:
        return done.get(Action(stage, "forward", microbatch))
    behind = done.get(Action(stage + 1, "backward", microbatch))
    return done.get(Action(stage + 1, "input", microbatch)) if behind is None else behind


def bubble_fraction(spans: Sequence[Sequence[Span]], seconds: float | None = None) -> float:
    """The share of all ranks' time in which they computed nothing.

    Args:
        spans: by rank.
        seconds: of the step; by default from the first start to the last end.
    """
    everything = [span for rank in spans for span in rank]
    if seconds is None:
        seconds = max(s.end for s in everything) - min(s.start for s in everything)
    busy = sum(span.seconds for span in everything)
    return 1.0 - busy / (seconds * len(spans))


def expected_bubble_fraction(
    schedule: Schedule,
    stages: int,
    microbatches: int,
    *,
    chunks: int = 1,
    forward: float = 1.0,
    input: float = 1.0,
    weight: float = 1.0,
) -> float:
    """:func:`bubble_fraction` of a schedule in closed form, for stages of equal cost.

    A rank works for ``microbatches x chunks`` times one chunk's forward, input and weight part. The
    idle time beside that is, with p ranks,

    ============  =================================  =============================================
    schedule      idle seconds of a rank             source
    ============  =================================  =============================================
    gpipe, 1f1b   (p-1) (forward + input + weight)   Huang et al. 2019, section 2.3; Narayanan et
                                                     al. 2021, section 2.2.1
    interleaved   the same, of a chunk               Narayanan et al. 2021, section 2.2.2
    zero-bubble   (p-1) (forward + input - weight)   ZB-H1: Qi et al. 2023, Table 2; with several
                                                     chunks a rank: of a chunk
    zbv           (p-1) forward                      Qi et al. 2023, section 6, where the three
                                                     parts cost the same: every rank works without
                                                     a break, and they start one after another
    ============  =================================  =============================================

    so that with equal parts the fractions are (p-1) / (m+p-1), (p-1) / (v m+p-1) and, for both
    zero-bubble schedules, (p-1) / (3 v m+p-1).

    Args:
        stages: ranks p of the pipeline.
        microbatches: m; at least p, for zbv at least 2p - 1, with fewer of which a pipeline does
            not fill.
        chunks: stages v on each rank: 1 for gpipe and 1f1b, 2 for zbv.
        forward, input, weight: seconds of a microbatch on one stage, or their ratios.

    Raises:
        ValueError: a number of microbatches or chunks that the schedule does not have; zbv with
            parts of unequal cost, for which :func:`simulate` an order.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: one of {', '.join(SCHEDULES)}")
    least = 2 * stages - 1 if schedule == "zbv" else 1 if schedule == "gpipe" else stages
    if microbatches < least:
        raise ValueError(
            f"{microbatches} microbatches do not fill {stages} ranks under {schedule!r}: "
            f"at least {least} do"
        )
    fixed = {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(schedule)
    if fixed is not None and chunks != fixed:
        raise ValueError(f"{schedule!r} has {fixed} stages a rank, not {chunks}")
    if schedule == "zbv" and not forward == input == weight:
        raise ValueError(
            "zbv has a closed form where forward, input and weight part cost the same; here "
            f"they cost {forward}, {input} and {weight}"
        )
    one = {
        "zero-bubble": max(0.0, forward + input - weight),
        "zbv": forward,
    }.get(schedule, forward + input + weight)
    idle = (stages - 1) * one
    return idle / (microbatches * chunks * (forward + input + weight) + idle)


def most_in_flight(actions: Sequence[Action]) -> int:
    """The most microbatches whose activations a rank keeps at once, each of its stages counted.

    They are kept from the forward to the end of the backward, of the weight part where the two
    parts are apart. GPipe keeps all m; 1F1B min(p - stage, m) (Narayanan et al. 2021, section
    2.2.1).
    """
    kept = most = 0
    for action in actions:
        kept += {"forward": 1, "input": 0}.get(action.kind, -1)
        most = max(most, kept)
    return most
