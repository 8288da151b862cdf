"""``colrow verify``: the split model against the unsplit one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from colrow.cli.common import (
    add_device,
    add_dtype,
    add_engine,
    add_json,
    add_sequence_parallel,
    add_tensor_split,
    add_tp,
    announce,
    conclude,
    positive_int,
    run_on_ranks,
    say,
    torch_dtype,
    write_json,
)
from colrow.cli.parser import Parser
from colrow.progress import Progress

if TYPE_CHECKING:
    from colrow.tiny_models.architectures import Architecture
    from colrow.verification.in_place import Outcome
    from colrow.verification.verify import Report

HELP = "prove that the split model computes what the unsplit one does"
DESCRIPTION = """\
Splits MODEL over --tp ranks and compares logits, loss, the gradient of every parameter and greedily
decoded tokens with transformers' own unsplit model, which runs in fp64. Errors are relative:
||split - reference|| / ||reference||. Accepted are 1e-12 in fp64, 1e-5 in fp32 (1e-6 for the loss)
and 2e-2 in 16 bits, or twice what the unsplit model itself loses to rounding in that precision,
tensor by tensor. Exits with 0 when everything holds; with 1, and the name of the first layer that
differs (embedding, blocks, norm, head), when it does not. --dtype fp64 is the sharpest check: there
a bug has nowhere to hide.

A MODEL that is none of the decoder's families (colrow generate --help lists them) is split in place
by colrow.parallelize instead, through transformers' own class; there 1e-10 is accepted in fp64.
--architecture takes a tiny random model of any of transformers' types (--list-architectures), its
sizes awkward on purpose.

  colrow verify SmolLM2-135M-Instruct.Q4_1.gguf --tp 2
  colrow verify ./my-model --tp 4 --sequence-parallel --dtype fp64
  colrow verify ./my-encoder --in-place --tp 3
  colrow verify --architecture mixtral --tp 3
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face directory, cached hub id, or .gguf file",
    )
    which = parser.add_argument_group("model")
    which.add_argument(
        "--architecture",
        metavar="NAME",
        help="instead of MODEL, a tiny random model of this type (--list-architectures)",
    )
    which.add_argument(
        "--list-architectures", action="store_true", help="print the names of all types and stop"
    )
    which.add_argument(
        "--in-place",
        action="store_true",
        help="split transformers' own model in place, also where the decoder knows the family",
    )
    layout = parser.add_argument_group("layout")
    add_tp(layout, default=2)
    add_sequence_parallel(layout)
    add_tensor_split(layout)
    numbers = parser.add_argument_group("what is compared")
    add_dtype(numbers)
    numbers.add_argument(
        "--weights",
        choices=("plain", "quantised"),
        default="plain",
        help="quantised: leave the weights in the blocks of a GGUF file, as generate does, and "
        "compare logits and greedy tokens; fp64 multiplies the blocks exactly (default plain)",
    )
    numbers.add_argument(
        "--batch", type=positive_int, default=2, metavar="N", help="rows compared (default 2)"
    )
    numbers.add_argument(
        "--sequence",
        type=positive_int,
        default=31,
        metavar="N",
        help="tokens per row (default 31, an odd number on purpose)",
    )
    add_device(numbers)
    add_engine(numbers)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--all", action="store_true", help="list every parameter, not only the largest errors"
    )
    add_json(output)
    parser.rare("tensor_split", "batch", "sequence", "engine")


def run(args: argparse.Namespace) -> int:
    """Verifies and prints the report."""
    if args.list_architectures:
        from colrow.tiny_models.architectures import architectures

        print(*(each.name for each in architectures()), sep="\n")
        return 0
    if (args.model is None) == (args.architecture is None):
        raise ValueError("give either MODEL or --architecture NAME")
    if args.weights == "quantised":
        from colrow.cli.verify_quantised import run_quantised

        return run_quantised(args)
    with Progress(f"reading {args.model or args.architecture}"):
        from colrow.any_model.loading import describe_model, known_to_decoder

        described = not (args.architecture or args.in_place) and known_to_decoder(args.model)
    if not described:
        return _run_in_place(args)
    if args.sequence < 2:
        raise ValueError("--sequence must be at least 2: the loss compares a token with the next")
    known = describe_model(args.model, tp=args.tp, tensor_split=args.tensor_split)
    if known.max_positions is not None and args.sequence > known.max_positions:
        raise ValueError(
            f"--sequence {args.sequence} is longer than the model's context of "
            f"{known.max_positions} positions: use at most that"
        )
    report = run_on_ranks(_verify, args, ranks=args.tp)
    return 0 if report is None else conclude(report, args, lambda: show(report, every=args.all))


def _run_in_place(args: argparse.Namespace) -> int:
    from colrow.checkpoint.locate import resolve_model_path
    from colrow.tiny_models.architectures import architectures, saved_architecture

    if args.tp < 2:
        raise ValueError("--tp must be at least 2 here: one rank would hold the whole model")
    if args.sequence_parallel:
        raise ValueError("--sequence-parallel cannot be verified in place")
    if args.tensor_split:
        raise ValueError("--tensor-split is for the decoder's families, not for models in place")
    if args.device not in (None, "cpu"):
        raise ValueError(f"--device {args.device}: in place is verified on the CPU")
    if args.dtype not in ("fp32", "fp64"):
        raise ValueError(f"--dtype {args.dtype}: verify fp32 or fp64 in place")
    if args.architecture:
        chosen = architectures([args.architecture])
    else:
        chosen = [saved_architecture(resolve_model_path(args.model))]
    outcomes = [run_on_ranks(_compare, args, each, ranks=args.tp) for each in chosen]
    done = [outcome for outcome in outcomes if outcome is not None]
    if args.json:
        write_json([outcome.as_dict() for outcome in done], args.json)
    if args.json != "-":
        for outcome in done:
            _show_outcome(outcome)
    return 0 if all(outcome.verdict == "passed" for outcome in done) else 1


def _compare(args: argparse.Namespace, architecture: Architecture) -> Outcome | None:
    from colrow.verification.in_place import compare

    return compare(architecture, args.tp, dtype=torch_dtype(args.dtype))


def _verify(args: argparse.Namespace) -> Report | None:
    from colrow.comm.mesh import init_mesh
    from colrow.verification.verify import verify

    mesh = init_mesh(tp=args.tp, device=args.device, engine=args.engine)
    announce(mesh)
    return verify(
        args.model,
        mesh,
        dtype=torch_dtype(args.dtype),
        sequence_parallel=args.sequence_parallel,
        tensor_split=args.tensor_split,
        batch=args.batch,
        sequence=args.sequence,
        progress=say,
    )


def _show_outcome(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{outcome.name}: split in place against whole (tp={outcome.tp})")
    for column in ("what", "relative error"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, error in (
        ("outputs", outcome.output_error),
        ("loss", outcome.loss_error),
        (f"worst gradient: {outcome.worst_gradient}", outcome.gradient_error),
    ):
        if error is not None:
            table.add_row(what, f"{error:.1e}")
    if table.row_count:
        console.print(table)
    if outcome.share is not None:
        console.print(f"Split over the ranks: {outcome.share:.1%} of the weights.")
    if outcome.greedy is not None:
        console.print(
            f"Greedy generation {'as the' if outcome.greedy else 'differs from the'} whole model's."
        )
    if outcome.first_difference:
        console.print(f"[red]First module that differs[/]: {outcome.first_difference}")
    colour = "green" if outcome.verdict == "passed" else "red"
    reason = f": {outcome.reason}" if outcome.reason else ""
    console.print(f"[{colour}]{outcome.verdict.upper()}[/]{reason}", highlight=False)


def show(report: Report, *, every: bool = False) -> None:
    """Prints the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    sequence = ", sequence parallel" if report.sequence_parallel else ""
    held = Table(title=f"What each rank holds (tp={report.tp}, {report.dtype}{sequence})")
    for column in ("rank", "query heads", "KV heads", "weights"):
        held.add_column(column, justify="right")
    rows = zip(report.heads_per_rank, report.weight_bytes_per_rank, strict=True)
    for rank, ((query, key_value), size) in enumerate(rows):
        held.add_row(str(rank), str(query), str(key_value), f"{size / 1e6:.1f} MB")
    console.print(held)

    limits = report.tolerances
    table = Table(title="Split against unsplit: relative errors; gradients by name")
    table.add_column("what", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("accepted", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)

    def row(name: str, error: float, limit: float) -> None:
        verdict = "[green]ok[/]" if error <= limit else "[red]differs[/]"
        table.add_row(name, f"{error:.1e}", f"{limit:.0e}", verdict)

    row("logits", report.logits_error, limits.logits)
    row("loss", report.loss_error, limits.loss)
    table.add_section()
    accepted = report.gradient_tolerances
    worst = sorted(report.gradient_errors.items(), key=lambda item: -item[1])
    if every:
        for name, error in report.gradient_errors.items():
            row(name, error, accepted[name])
    else:
        bad = [item for item in worst if not item[1] <= accepted[item[0]]]
        for name, error in bad[:20] or worst[:5]:
            row(name, error, accepted[name])
        shown = len(bad[:20] or worst[:5])
        if len(worst) > shown:
            table.add_row(f"{len(worst) - shown} more gradients (--all)", "", "", "")
    console.print(table)
    right = sum(error <= accepted[name] for name, error in report.gradient_errors.items())
    console.print(f"Gradients within tolerance: {right} of {len(worst)} parameters.")
    if report.not_finite:
        console.print(f"[red]Not finite[/]: {report.not_finite}")
    elif report.rounding.gradients:
        console.print(
            f"The unsplit model in {report.dtype} itself is off by up to "
            f"{report.rounding.gradients:.1e} (gradients), {report.rounding.logits:.1e} (logits)."
        )
    count = len(report.greedy_tokens)
    if not count:
        console.print("[red]Greedy decoding[/]: left out, the logits are not finite")
    elif report.greedy_equal:
        console.print(f"Greedy decoding: all {count} tokens as the reference's.")
    else:
        console.print(f"[red]Greedy decoding differs[/]: {report.greedy_tokens}")
        console.print(f"               reference: {report.reference_tokens}")
    if report.first_difference:
        console.print(f"[red]What differs first[/]: {report.first_difference}")
    console.print("[green]PASSED[/]" if report.passed else "[red]FAILED[/]")
