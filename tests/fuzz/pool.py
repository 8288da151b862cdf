"""Runs cases on ranks that stay, and judges what came back."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import colrow
from benchmarks.zoo.pool import Raised, TaskFailure, Workers
from tests.fuzz.case import Case, World

SECONDS_PER_CASE = 90.0
_TASKS_PER_LIFE = 300
_REFUSALS = ("ValueError", "TypeError", "RuntimeError", "NotImplementedError", "LeftAloneError")
_SOURCE = str(Path(colrow.__file__).parent)
# Every rank of a case is given the same: whoever says otherwise has seen wrong numbers.
_BLAMES = re.compile("drifted apart|different (batches|weights|seeds|ways|splits)|another rank")
_FRAME = re.compile(r'^  File "(.+?)", line \d+, in .+\n    (.*)$', re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        word: "right"; "refused", in a clear sentence; "not run", since the unsplit model does not
            either; "wrong".
        why: sentences; for a refusal, what it says.
        traceback: of what was raised.
    """

    word: str
    why: list[str] = field(default_factory=list)
    traceback: str = ""


class Ranks:
    """The ranks of a fuzz. Use as a context manager."""

    def __init__(self, ranks: int, seconds_per_case: float = SECONDS_PER_CASE) -> None:
        self.ranks, self._seconds = ranks, seconds_per_case
        self._workers = Workers(ranks, _TASKS_PER_LIFE)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.stop()

    def run(self, kind: str, case: Case) -> Verdict:
        """Runs one case; ranks that hang, die or part are wrong, and new ones take over."""
        directory = tempfile.mkdtemp(prefix="colrow-fuzz-")
        try:
            wrong = self._workers.run(
                run_on_rank, kind, case, self.ranks, directory, timeout_seconds=self._seconds
            )
            return Verdict("wrong", wrong) if wrong else Verdict("right")
        except TaskFailure as failure:
            return judged(failure)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def judged(failure: TaskFailure) -> Verdict:
    """Whether what the ranks raised is a refusal in a clear sentence."""
    raised = failure.raised
    if raised is None:  # they hang, or one died
        return Verdict("wrong", [str(failure)])
    said = f"{raised.type_name}: {raised.message}"
    if not failure.on_all_ranks:
        return Verdict("wrong", [f"rank {raised.rank} alone raised {said}"], raised.traceback)
    if raised.type_name == "NotRunError":
        return Verdict("not run", [raised.message])
    unclear = why_unclear(raised)
    if unclear:
        return Verdict("wrong", [f"no clear refusal ({unclear}): {said}"], raised.traceback)
    return Verdict("refused", [raised.message])


def why_unclear(raised: Raised) -> str:
    """Why an exception is no refusal that a user can act on; "" for one that is.

    colrow itself must have raised it, with a sentence or a few of them.
    """
    if raised.type_name not in _REFUSALS:
        return f"a {raised.type_name}"
    frames = _FRAME.findall(raised.traceback)
    if not frames or not frames[-1][0].startswith(_SOURCE):
        return "not raised by colrow"
    if not frames[-1][1].startswith("raise"):
        return "not raised on purpose"
    if not 20 <= len(raised.message) <= 900 or len(raised.message.split()) < 4:
        return f"{len(raised.message)} characters are no sentence"
    if _BLAMES.search(raised.message):
        return "the ranks were given the same"
    return ""


def run_on_rank(kind: str, case: Case, ranks: int, directory: str) -> list[str]:
    """What is wrong, from all ranks together, on every rank."""
    import torch
    import torch.distributed as dist

    from tests.fuzz.kinds import RUNNABLE

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    world = World(dist.get_rank(), ranks, Path(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = RUNNABLE[kind].run(world, case)
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, wrong)
    return list(dict.fromkeys(sentence for of_rank in every for sentence in of_rank))
