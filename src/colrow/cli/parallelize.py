"""``colrow parallelize``: what would be split, and why."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from colrow.cli.common import add_json, positive_int, write_json
from colrow.cli.parser import Parser

if TYPE_CHECKING:
    from colrow.inplace.plan import Plan

HELP = "show how a model of transformers would be split in place, and why"
DESCRIPTION = """\
Takes a directory that transformers saved, of which only the configuration is read, or with
--architecture the name of a model type, of which a tiny random model is made, and shows for each
kind of layer what colrow.parallelize would do with it on --tp ranks. Nothing is sent and nothing is
written. The styles are those of colrow's plans.

  colrow parallelize path/to/model --tp 4 --explain
  colrow parallelize --architecture bloom --tp 3 --explain --json plan.json
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a directory")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="a model type, such as bloom (colrow verify --list-architectures)",
    )
    parser.add_argument("--tp", type=positive_int, default=2, metavar="N", help="ranks (2)")
    parser.add_argument(
        "--explain", action="store_true", help="also what stays whole, and every reason"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Finds the plan and prints it."""
    if (args.model is None) == (args.architecture is None):
        raise ValueError("give either a model's directory or --architecture NAME")
    if args.tp < 2:
        raise ValueError("--tp must be at least 2: on one rank nothing is split")
    from colrow.inplace.api import plan_for
    from colrow.tiny_models.architectures import architectures, build

    if args.model is not None:
        plan = plan_for(args.model, args.tp)
    else:
        plan = plan_for(build(architectures([args.architecture])[0]), args.tp)
    if args.json:
        rows = [vars(row) for row in plan.rows]
        write_json(
            {"tp": args.tp, "plan": dict(plan), "share": plan.share, "rows": rows}, args.json
        )
    if args.json != "-":
        show(plan, args.tp, explain=args.explain)
    return 0


def show(plan: Plan, tp: int, *, explain: bool) -> None:
    """Prints the plan as a table, without what stays whole unless ``explain``."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"tp={tp}", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("module", "style"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "a rank's"):
        table.add_column(column, justify="right", no_wrap=True)
    if explain:
        table.add_column("why", overflow="fold")
    for row in plan.rows:
        if explain or row.style != "replicate":
            cells = [row.module, row.style, f"{row.parameters:,}", f"{100 * row.share:.0f} %"]
            table.add_row(*cells, *([row.why] if explain else []))
    console.print(table)
    console.print(f"A rank holds {100 * plan.share:.1f} % of the parameters.")
