"""``colrow zoo``: every architecture of transformers, split and compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from colrow.cli.common import add_json, destination, positive_int, write_json

if TYPE_CHECKING:
    from colrow.zoo.compare import Outcome

HELP = "split a tiny model of every architecture and compare it with the whole one"
DESCRIPTION = """\
Builds a tiny model with random weights of every architecture that the installed transformers has
(all its causal language models, and the best-known encoders, encoder-decoders and vision models),
splits it with colrow.parallelize and compares logits, loss, the gradient of every parameter and
greedy generation with the unsplit model, in fp64, to 1e-10. Sizes are awkward on purpose: 5 heads,
or 6 over 2 or 3 KV heads, odd MLPs, a vocabulary of 97. Each architecture ends as passed, refused
with a reason, or failed; the share is that of the weights of attention, MLPs, embedding and head
which were spread over the ranks. Exits with 1 when one failed.

The column generate is another run, at the first of the --tp sizes: every causal language model is
saved, loaded as colrow generate loads it, and passes when it continues two prompts in one batch
with the tokens that transformers gives each of them alone.

  colrow zoo --only llama,gpt2,mixtral --tp 2,3
  colrow zoo --against transformers --markdown docs/zoo.md
  colrow zoo --resume zoo.jsonl                # goes on where a run that was stopped ended
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--only",
        type=lambda text: [name for name in text.split(",") if name],
        metavar="NAMES",
        help='model types, separated by commas, such as "llama,gpt2" (default: all)',
    )
    parser.add_argument(
        "--tp",
        type=_sizes,
        default=[2, 3],
        metavar="N,N",
        help="tensor-parallel sizes, separated by commas (default 2,3)",
    )
    parser.add_argument(
        "--against",
        choices=["transformers"],
        help="also compare transformers' own tensor parallelism, on the same models and on models "
        "whose sizes all divide by 2 and 3",
    )
    parser.add_argument(
        "--seconds",
        type=positive_int,
        default=60,
        metavar="S",
        help="count an architecture as failed after S seconds (default 60)",
    )
    parser.add_argument(
        "--resume",
        type=destination,
        metavar="FILE",
        help="keep every outcome in FILE as it comes, and take those that it holds from there",
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--markdown",
        type=destination,
        metavar="FILE",
        help="write the scoreboard into FILE, in place of the one that it may have",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compares and prints the scoreboard."""
    from colrow.zoo.architectures import architectures
    from colrow.zoo.board import summary, write_markdown

    if args.list:
        print("\n".join(a.name for a in architectures(args.only)))
        return 0
    outcomes = _compare(args)
    if args.json:
        write_json([outcome.as_dict() for outcome in outcomes], args.json)
    if args.markdown:
        write_markdown(outcomes, Path(args.markdown), _command(args))
    if args.json != "-":
        _show(outcomes)
        print("\n".join(summary(outcomes)))
    return 1 if any(o.verdict == "failed" and o.system != "transformers" for o in outcomes) else 0


def _compare(args: argparse.Namespace) -> list[Outcome]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    from colrow.zoo.architectures import architectures
    from colrow.zoo.board import run_zoo
    from colrow.zoo.store import Store

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
            run_zoo(left, tp, system, progress=advance, seconds_per_model=args.seconds)
            found = [store.find(a, system, tp) for a in mine]
            outcomes += [outcome for outcome in found if outcome is not None]
    return outcomes


def _show(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    from colrow.zoo.board import cell, columns, greedy, reasons, rows, worst_error

    colours = {"passed": "green", "refused": "yellow", "failed": "red", "not run": "dim"}
    table = Table()
    table.add_column("architecture")
    for column in columns(outcomes):
        table.add_column(column.title)
    for title in ("worst error", "greedy", "why not"):
        table.add_column(title)
    for name, row in rows(outcomes).items():
        cells = [f"[{colours[o.verdict]}]{cell(o)}[/]" if o is not None else "" for o in row]
        table.add_row(name, *cells, worst_error(row), greedy(row), reasons(row))
    Console().print(table)


def _command(args: argparse.Namespace) -> str:
    words = ["colrow zoo"]
    if args.only:
        words.append(f"--only {','.join(args.only)}")
    words.append(f"--tp {','.join(map(str, args.tp))}")
    if args.against:
        words.append(f"--against {args.against}")
    return " ".join([*words, f"--markdown {args.markdown}"])


def _sizes(text: str) -> list[int]:
    """An argparse type: tp sizes of at least 2."""
    sizes = [int(word) if word.isdigit() else 0 for word in text.split(",")]
    if min(sizes) < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers of at least 2, such as 2,3: one rank holds "
            "the whole model"
        )
    return sizes
