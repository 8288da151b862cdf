"""``colrow verify --weights quantised``: quantised generation against the exact model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from colrow.cli.common import announce, conclude, run_on_ranks, say, torch_dtype

if TYPE_CHECKING:
    from colrow.verification.quantised import QuantisedReport


def run_quantised(args: argparse.Namespace) -> int:
    """Verifies and prints the report."""
    if args.sequence_parallel or args.in_place or args.architecture:
        raise ValueError(
            "--weights quantised is for GGUF files of the described families, without "
            "--sequence-parallel"
        )
    if args.device not in (None, "cpu") or args.dtype not in ("fp32", "fp64"):
        raise ValueError("--weights quantised is verified on the CPU, in fp32 or fp64")
    report = run_on_ranks(_verify_quantised, args, ranks=args.tp)
    return 0 if report is None else conclude(report, args, lambda: show_quantised(report))


def _verify_quantised(args: argparse.Namespace) -> QuantisedReport | None:
    from colrow.comm.mesh import init_mesh
    from colrow.verification.quantised import verify_quantised

    mesh = init_mesh(tp=args.tp, device=args.device, engine=args.engine)
    announce(mesh)
    return verify_quantised(
        args.model,
        mesh,
        dtype=torch_dtype(args.dtype),
        tensor_split=args.tensor_split,
        sequence=args.sequence,
        progress=say,
    )


def show_quantised(report: QuantisedReport) -> None:
    """Prints the report as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Quantised and split (tp={report.tp}, {report.dtype}) against exact")
    for column in ("logits", "error", "unsplit", "accepted", ""):
        table.add_column(column, justify="left" if column == "logits" else "right")
    for name, error, rounding, limit in (
        ("all tokens at once", report.prompt_error, report.prompt_rounding, report.accepted_prompt),
        (
            "one token after the other",
            report.decoding_error,
            report.decoding_rounding,
            report.accepted_decoding,
        ),
    ):
        verdict = "[green]ok[/]" if error <= limit else "[red]differs[/]"
        table.add_row(name, f"{error:.1e}", f"{rounding:.1e}", f"{limit:.0e}", verdict)
    console.print(table)
    likely = "all are" if report.greedy_likely else "[red]not all are[/]"
    console.print(
        f"Greedy decoding: of {len(report.greedy_tokens)} tokens {likely} as likely in the exact "
        "model as its best ones, up to rounding."
    )
    held = report.weight_bytes_per_rank
    console.print(
        f"Weights: {' + '.join(f'{size / 1e6:.1f}' for size in held)} MB, "
        f"{sum(held) / report.file_bytes:.2f} times the file."
    )
    console.print("[green]PASSED[/]" if report.passed else "[red]FAILED[/]")
