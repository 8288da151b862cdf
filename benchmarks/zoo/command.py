"""What ``colrow zoo`` does with its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from benchmarks.zoo import board
from benchmarks.zoo.store import Store
from colrow.cli.common import write_json
from colrow.tiny_models.architectures import architectures
from colrow.verification.in_place import Outcome

_COLOURS = {"passed": "green", "refused": "yellow", "failed": "red", "not run": "dim"}


def run(args: argparse.Namespace) -> int:
    """Compares and prints the scoreboard; 1 when an architecture failed."""
    outcomes = _compare(args)
    if args.json:
        write_json([outcome.as_dict() for outcome in outcomes], args.json)
    if args.markdown:
        board.write_markdown(outcomes, Path(args.markdown), _command(args))
    if args.json != "-":
        _show(outcomes)
        print("\n".join(board.summary(outcomes)))
    return 1 if any(o.verdict == "failed" and o.system != "transformers" for o in outcomes) else 0


def _compare(args: argparse.Namespace) -> list[Outcome]:
    store = Store(Path(args.resume) if args.resume else None)
    jobs = [("colrow", False, tp) for tp in args.tp]
    jobs += [("generate", False, args.tp[0])]
    if args.against:
        jobs += [(args.against, even, tp) for even in (False, True) for tp in args.tp]
    chosen = {even: architectures(args.only, even=even) for even in (False, True)}
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        for system, even, tp in jobs:
            task = bar.add_task(f"{system}, tp={tp}", total=len(chosen[even]))

            def advance(outcome: Outcome, task: TaskID = task) -> None:
                store.add(outcome)
                bar.advance(task)

            mine = [a for a in chosen[even] if a.is_causal_lm or system != "generate"]
            left = [a for a in mine if store.find(a, system, tp) is None]
            bar.advance(task, len(chosen[even]) - len(left))
            board.run_zoo(left, tp, system, progress=advance, seconds_per_model=args.seconds)
            found = [store.find(a, system, tp) for a in mine]
            outcomes += [outcome for outcome in found if outcome is not None]
    return outcomes


def _show(outcomes: list[Outcome]) -> None:
    table = Table()
    table.add_column("architecture")
    for column in board.columns(outcomes):
        table.add_column(column.title)
    for title in ("worst error", "greedy", "why not"):
        table.add_column(title)
    for name, row in board.rows(outcomes).items():
        cells = [f"[{_COLOURS[o.verdict]}]{board.cell(o)}[/]" if o is not None else "" for o in row]
        about = (board.worst_error(row), board.greedy(row), board.reasons(row))
        table.add_row(name, *cells, *about)
    Console().print(table)


def _command(args: argparse.Namespace) -> str:
    words = ["colrow zoo"]
    if args.only:
        words.append(f"--only {','.join(args.only)}")
    words.append(f"--tp {','.join(map(str, args.tp))}")
    if args.against:
        words.append(f"--against {args.against}")
    return " ".join([*words, f"--markdown {args.markdown}"])
