"""Cases one after the other until the time is over, and what they showed."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.kinds import KINDS
from tests.fuzz.pool import Ranks, Verdict
from tests.fuzz.shrink import shrunk

_PYTHON = ".venv/bin/python"
_SECONDS_TO_SHRINK = 45.0


@dataclass(frozen=True)
class Finding:
    """A case that is wrong.

    Attributes:
        kind, number: which it is.
        why: what was wrong with it.
        case, smallest: as drawn, and as small as it became.
        why_smallest: what is wrong with that one.
        again, again_smallest: commands that run them alone.
        traceback: of what was raised, if anything.
    """

    kind: str
    number: int
    why: list[str]
    case: Case
    smallest: Case
    why_smallest: list[str]
    again: str
    again_smallest: str
    traceback: str = ""


@dataclass
class Result:
    """What a fuzz showed.

    Attributes:
        counts: by kind, how many cases got which word of :class:`tests.fuzz.pool.Verdict`.
        refusals, not_run: by kind and sentence, how often.
        first: by sentence, the first case that it was said of.
    """

    ranks: int
    seed: int
    seconds: float = 0.0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    refusals: dict[str, Counter[str]] = field(default_factory=dict)
    not_run: dict[str, Counter[str]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> Counter[str]:
        """The counts of all kinds together."""
        return sum(self.counts.values(), Counter())

    def add(self, kind: str, number: int, verdict: Verdict) -> None:
        """Counts a verdict."""
        self.counts.setdefault(kind, Counter())[verdict.word] += 1
        if verdict.word in ("refused", "not run"):
            said = self.refusals if verdict.word == "refused" else self.not_run
            sentence = " ".join(verdict.why)
            said.setdefault(kind, Counter())[sentence] += 1
            self.first.setdefault(sentence, f"{kind}:{number}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counters = ("counts", "refusals", "not_run")
        counted = {
            name: {kind: dict(count.most_common()) for kind, count in getattr(self, name).items()}
            for name in counters
        }
        findings = [asdict(finding) for finding in self.findings]
        return {**vars(self), **counted, "findings": findings}


def command(ranks: int, seed: int, only: str) -> str:
    """What runs one case alone."""
    return f"{_PYTHON} -m tests.fuzz --ranks {ranks} --seed {seed} --only {only}"


def command_for(ranks: int, kind: str, case: Case) -> str:
    """What runs this very case, whatever the fuzz draws by then."""
    return f"{_PYTHON} -m tests.fuzz --ranks {ranks} --case '{kind}:{json.dumps(case)}'"


def fuzz(
    ranks: int,
    seed: int,
    seconds: float,
    kinds: list[str],
    *,
    number: int | None = None,
    case: Case | None = None,
    shrink: bool = True,
    stop_at_first: bool = False,
    seconds_per_case: float,
    progress: Callable[[str, int, Verdict, Result], None],
    found: Callable[[Finding], None],
) -> Result:
    """Runs cases of these kinds; one alone when it is given, or its number.

    Args:
        stop_at_first: stop when a case is wrong.
        progress: told of every case.
        found: told of each that is wrong.
    """
    result = Result(ranks, seed)
    source = random.Random(f"{seed}/order")
    weights = [KINDS[name].weight for name in kinds]
    numbers = dict.fromkeys(kinds, -1)
    begin = time.monotonic()
    with Ranks(ranks, seconds_per_case) as pool:
        while True:
            name = source.choices(kinds, weights)[0]
            numbers[name] = numbers[name] + 1 if number is None else number
            drawn = case if case is not None else KINDS[name].draw(ranks, seed, numbers[name])
            verdict = pool.run(name, drawn)
            result.add(name, numbers[name], verdict)
            result.seconds = time.monotonic() - begin
            progress(name, numbers[name], verdict, result)
            if verdict.word == "wrong":
                again = command(ranks, seed, f"{name}:{numbers[name]}")
                finding = _smallest(pool, name, numbers[name], drawn, verdict, again, shrink)
                result.findings.append(finding)
                found(finding)
            result.seconds = time.monotonic() - begin
            enough = stop_at_first and bool(result.findings)
            if enough or number is not None or case is not None or result.seconds >= seconds:
                return result


def _smallest(
    pool: Ranks, name: str, number: int, case: Case, verdict: Verdict, again: str, shrink: bool
) -> Finding:
    last = [verdict]

    def fails(simpler: Case) -> bool:
        now = pool.run(name, simpler)
        if now.word != "wrong" or bool(now.traceback) != bool(verdict.traceback):
            return False
        last.append(now)
        return True

    smallest = case
    if shrink:
        fields = KINDS[name].fields(pool.ranks)
        smallest = shrunk(case, fields, fails, seconds=_SECONDS_TO_SHRINK)
    smaller = last[-1]
    return Finding(
        name,
        number,
        verdict.why,
        case,
        smallest,
        smaller.why,
        again,
        command_for(pool.ranks, name, smallest),
        smaller.traceback or verdict.traceback,
    )
