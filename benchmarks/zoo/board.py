"""Every architecture compared, and the table of what became of them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.zoo.generate import generates
from benchmarks.zoo.pool import TaskFailure, Workers
from benchmarks.zoo.systems import SYSTEMS
from colrow.leftovers import scratch_directory
from colrow.tiny_models.architectures import Architecture
from colrow.verification.in_place import Outcome, compare

SECONDS_PER_MODEL = 60.0


def run_zoo(
    architectures: Sequence[Architecture],
    tp: int,
    system: str = "colrow",
    *,
    progress: Callable[[Outcome], None] = lambda _: None,
    seconds_per_model: float = SECONDS_PER_MODEL,
    tamper: Callable[[nn.Module, int], None] | None = None,
) -> list[Outcome]:
    """Compares each architecture at one tp size, in ranks that it starts.

    Args:
        tp: at least 2.
        system: "colrow", "transformers", or "generate" for the tokens of ``colrow generate``.
        progress: told of each outcome.
        seconds_per_model: after which an architecture counts as failed.
        tamper: for testing the comparison: applied to the split model, with the rank.

    Raises:
        ValueError: when ``tp`` is below 2: there is nothing to compare.
    """
    if tp < 2:
        raise ValueError(f"tp={tp}: one rank holds the whole model; compare tp=2 or more")
    outcomes = []
    with Workers(tp) as workers:
        for architecture in architectures:
            outcome = _one(workers, architecture, tp, system, seconds_per_model, tamper)
            outcomes.append(outcome)
            progress(outcome)
    return outcomes


def _one(
    workers: Workers,
    architecture: Architecture,
    tp: int,
    system: str,
    seconds: float,
    tamper: Callable[[nn.Module, int], None] | None,
) -> Outcome:
    directory = str(scratch_directory("zoo-model"))
    try:
        outcome: Outcome
        if system == "generate":
            outcome = workers.run(generates, architecture, tp, directory, timeout_seconds=seconds)
        else:
            outcome = workers.run(
                compare,
                architecture,
                tp,
                SYSTEMS[system],
                directory,
                tamper,
                timeout_seconds=seconds,
            )
        return outcome
    except TaskFailure as failure:
        raised = failure.raised
        return Outcome(
            architecture.name,
            architecture.task,
            system,
            architecture.even,
            tp,
            "failed",
            reason=" ".join(str(failure).split()),
            traceback=raised.traceback if raised else "",
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class BoardColumn:
    """A column of the scoreboard: who split, models of which sizes, over how many ranks."""

    system: str
    even: bool
    tp: int

    @property
    def title(self) -> str:
        """For the table's head."""
        return f"{self.system}{', even sizes' if self.even else ''}, tp={self.tp}"


Row = Sequence[Outcome | None]


def columns(outcomes: Iterable[Outcome]) -> list[BoardColumn]:
    """The columns, in the order in which they were made."""
    return list(dict.fromkeys(BoardColumn(o.system, o.even, o.tp) for o in outcomes))


def rows(outcomes: Sequence[Outcome]) -> dict[str, Row]:
    """For each architecture its outcome in every column."""
    cells = {(o.name, BoardColumn(o.system, o.even, o.tp)): o for o in outcomes}
    heads = columns(outcomes)
    names = dict.fromkeys(o.name for o in outcomes)
    return {name: [cells.get((name, column)) for column in heads] for name in names}


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each column and kind of model: how many of each verdict, and how much split."""
    lines = []
    for column in columns(outcomes):
        mine = [o for o in outcomes if BoardColumn(o.system, o.even, o.tp) == column]
        for what, group in (
            ("causal LMs", [o for o in mine if o.task == "causal LM"]),
            ("others", [o for o in mine if o.task != "causal LM"]),
        ):
            if not group:
                continue
            count = Counter(o.verdict for o in group)
            if column.system == "generate":
                lines.append(
                    f"{column.title}, {what}: {count['passed']} of "
                    f"{len(group) - count['not run']} continue texts with transformers' tokens; "
                    f"{count['refused']} refused, {count['failed']} failed, {count['not run']} "
                    "continue none whole"
                )
                continue
            passed = [o for o in group if o.verdict == "passed"]
            wide = sum((o.share or 0.0) >= 0.9 for o in passed)
            lines.append(
                f"{column.title}, {what}: {count['passed']} of {len(group) - count['not run']} "
                f"passed, {wide} of them with at least 90 % of their weights split; "
                f"{count['refused']} refused, {count['failed']} failed, "
                f"{count['not run']} do not run whole"
            )
    return lines


def cell(outcome: Outcome) -> str:
    """The verdict, and the share in per cent."""
    share = f" {outcome.share:.0%}" if outcome.share is not None else ""
    return f"{outcome.verdict}{share}"


def worst_error(row: Row) -> str:
    """The largest relative error of colrow's."""
    errors = [
        error
        for o in _ours(row)
        for error in (o.output_error, o.loss_error, o.gradient_error)
        if error is not None
    ]
    return f"{max(errors):.0e}" if errors else ""


def greedy(row: Row) -> str:
    """Whether colrow's greedy tokens are the whole model's; "" where it does not generate."""
    said = [o.greedy for o in _ours(row) if o.greedy is not None]
    return ("equal" if all(said) else "differ") if said else ""


def reasons(row: Row) -> str:
    """Why colrow did not pass, or did not generate."""
    theirs = [o for o in row if o is not None and o.system != "transformers"]
    return "; ".join(dict.fromkeys(o.reason for o in theirs if o.reason))


def _ours(row: Row) -> list[Outcome]:
    return [o for o in row if o is not None and o.system == "colrow"]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The scoreboard as a Markdown table."""
    heads = ["architecture", "task", *(column.title for column in columns(outcomes))]
    heads += ["worst error", "greedy", "why not"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    tasks = {o.name: o.task for o in outcomes}
    for name, row in rows(outcomes).items():
        cells = [name, tasks[name], *("" if o is None else cell(o) for o in row)]
        cells += [worst_error(row), greedy(row), reasons(row)[:200].replace("|", "\\|")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_markdown(outcomes: Sequence[Outcome], destination: Path, command: str) -> None:
    """Replaces what stands between the two marks in the file, or writes a new one."""
    table = "\n".join(f"- {line}" for line in summary(outcomes)) + "\n\n" + markdown(outcomes)
    block = f"{_BEGIN}\nMade by `{command}`.\n\n{table}{_END}\n"
    text = destination.read_text(encoding="utf-8") if destination.exists() else ""
    if _BEGIN in text and _END in text:
        before, rest = text.split(_BEGIN, 1)
        text = before + block + rest.split(_END, 1)[1].removeprefix("\n")
    else:
        text += block
    destination.write_text(text, encoding="utf-8")


_BEGIN, _END = "<!-- scoreboard -->", "<!-- end of scoreboard -->"
