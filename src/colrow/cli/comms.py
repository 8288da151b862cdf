"""``colrow comms``: every collective of a training step, predicted and recorded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from colrow.cli.common import (
    DTYPES,
    add_device,
    add_dtype,
    add_engine,
    add_in_place,
    add_json,
    add_sequence_parallel,
    add_tensor_split,
    add_tp,
    announce,
    model_configuration,
    positive_int,
    run_on_ranks,
    torch_dtype,
    write_json,
)
from colrow.cli.parser import Parser
from colrow.launch import rank_environment
from colrow.progress import Progress
from colrow.sharding import Sharding
from colrow.text import bytes_text

if TYPE_CHECKING:
    from colrow.models.config import ModelConfig
    from colrow.verification.traffic import Traffic

HELP = "list every collective of a training step, predicted and recorded"
DESCRIPTION = """\
Predicts from MODEL's configuration which collectives one training step of a rank issues, with
the layer, the direction and the bytes of each; then runs the step, records what was really issued,
and compares call for call and byte for byte. Exits with 1 when they are not equal.

A MODEL of an architecture that colrow does not describe is transformers' own, split in place: there
the record of the split foretells the calls. Where they depend on the tokens (experts that are
called one by one), the command says so and shows what was recorded.

A checkpoint is run on --tp real ranks. A config.json or the name of a public model is run dry: the
same layers on tensors without memory and over a process group that only pretends, so any size
works on any machine.

  colrow comms SmolLM2-135M-Instruct.Q4_1.gguf --tp 2 --sequence-parallel
  colrow comms gpt3-175b --tp 8 --batch 1 --sequence 2048 --dtype bf16

bytes is the buffer that a collective works on, on each rank; wire is what the ring algorithm sends
from each rank: (n-1)/n of the buffer for a gather or a scatter, twice that for an all-reduce.
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hugging Face directory, .gguf file, config.json, hub id that is in the local cache, "
        "or a public model's name such as gpt3-175b or llama-3-70b; looked for in this order",
    )
    layout = parser.add_argument_group("layout")
    add_tp(layout, default=2)
    add_sequence_parallel(layout)
    layout.add_argument(
        "--recompute-gather",
        action="store_true",
        help="with --sequence-parallel: gather inputs again in backward rather than keep them",
    )
    add_tensor_split(layout)
    add_in_place(parser.add_argument_group("model"))
    step = parser.add_argument_group("step")
    step.add_argument("--batch", type=positive_int, default=1, metavar="N", help="rows (default 1)")
    step.add_argument(
        "--sequence", type=positive_int, default=128, metavar="N", help="tokens per row (128)"
    )
    step.add_argument(
        "--dry-run", action="store_true", help="run a checkpoint dry too: no ranks, no memory"
    )
    add_dtype(step)
    add_device(step)
    add_engine(step)
    output = parser.add_argument_group("output")
    output.add_argument("--all", action="store_true", help="one row for each layer of the model")
    add_json(output)
    parser.rare("recompute_gather", "tensor_split", "in_place", "trust_remote_code", "engine")


def run(args: argparse.Namespace) -> int:
    """Records, compares and prints."""
    if args.sequence < 2:
        raise ValueError("--sequence must be at least 2: the loss compares a token with the next")
    if args.recompute_gather and not args.sequence_parallel:
        raise ValueError("--recompute-gather changes --sequence-parallel alone: give both")
    with Progress(f"reading {args.model}"):
        config = _described(args)
    if config is None:
        traffic = run_on_ranks(_record, args, ranks=args.tp)
    elif (rank := rank_environment()) is not None and rank.rank > 0:
        return 0  # a dry run needs no ranks: where a launcher started some, one reports
    else:
        from colrow.verification.traffic import dry_run

        traffic = dry_run(
            config,
            args.tp,
            batch=args.batch,
            sequence=args.sequence,
            sharding=_sharding(args),
            tensor_split=args.tensor_split,
            dtype=torch_dtype(args.dtype),
        )
    if traffic is None:
        return 0
    if args.json:
        write_json(traffic.as_dict(), args.json)
    if args.json != "-":
        show(traffic, args)
    return 1 if traffic.equal is False else 0


def _described(args: argparse.Namespace) -> ModelConfig | None:
    """The configuration to run dry; None for a checkpoint that is to run on ranks.

    Raises:
        ValueError: a model that is not there or cannot be divided, or one that cannot run dry.
    """
    from colrow.any_model.loading import describe_model, known_to_decoder

    try:
        in_place = args.in_place or not known_to_decoder(args.model)
    except ValueError:  # no checkpoint: a public model's name, or one that nobody knows
        in_place = False
    if not in_place:
        config, has_weights = model_configuration(args.model)
        config.divide(args.tp, args.tensor_split)
        return None if has_weights and not args.dry_run else config
    known = describe_model(
        args.model,
        tp=args.tp,
        in_place=True,
        tensor_split=args.tensor_split,
        sharding=_sharding(args),
        trust_remote_code=args.trust_remote_code,
    )
    if args.dry_run:
        raise ValueError(f"--dry-run: this {known.name} is split in place, which takes real ranks")
    return None


def _sharding(args: argparse.Namespace) -> Sharding:
    return Sharding(args.sequence_parallel, keep_gathered_input=not args.recompute_gather)


def _record(args: argparse.Namespace) -> Traffic:
    from colrow.any_model.loading import load_model
    from colrow.comm.mesh import init_mesh
    from colrow.verification.traffic import record_step

    mesh = init_mesh(tp=args.tp, device=args.device, engine=args.engine)
    announce(mesh)
    model = load_model(
        args.model,
        mesh,
        dtype=torch_dtype(args.dtype),
        in_place=args.in_place,
        trust_remote_code=args.trust_remote_code,
        sharding=_sharding(args),
        tensor_split=args.tensor_split,
    )
    return record_step(model, batch=args.batch, sequence=args.sequence)


def show(traffic: Traffic, args: argparse.Namespace) -> None:
    """Prints both lists, layers of one kind in one row unless ``--all``."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    sequence = ", sequence parallel" if args.sequence_parallel else ""
    kind = ", split in place" if traffic.kind == "in place" else ""
    table = Table(
        title=f"Collectives of one step: tp={args.tp}, batch {args.batch} x {args.sequence}, "
        f"{DTYPES[args.dtype]}{sequence}{kind}",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for column in ("layer", "collective"):
        table.add_column(column, no_wrap=True)
    for column in ("bytes", "pred.", "rec.", "wire"):
        table.add_column(column, justify="right", no_wrap=True)
    predicted, recorded = (
        _grouped(rows, args.all) for rows in (traffic.predicted, traffic.recorded)
    )
    total_calls, total_wire, section = 0, 0.0, ""
    for key in dict.fromkeys([*predicted, *recorded]):
        phase, layer, op, size = key
        if phase != section:
            table.add_section()
            table.add_row(f"[bold]{phase}[/]")
            section = phase
        count = recorded.get(key, 0)
        wire = count * _wire(op, size, args.tp)
        total_calls, total_wire = total_calls + count, total_wire + wire
        expected = predicted.get(key, 0)
        table.add_row(
            layer,
            op.replace("_", "-"),
            bytes_text(size),
            "?" if traffic.unknown else str(expected),
            str(count),
            bytes_text(wire),
            style=None if traffic.unknown or expected == count else "red",
        )
    table.add_section()
    table.add_row(
        "all", "", "", str(sum(predicted.values())), str(total_calls), bytes_text(total_wire)
    )
    console.print(table)
    if traffic.seconds is not None and traffic.exposed_seconds is not None:
        console.print(
            f"Time in collectives: {traffic.seconds * 1e3:.1f} ms, of which "
            f"{traffic.exposed_seconds * 1e3:.1f} ms not hidden behind computing (rank 0)."
        )
    if traffic.unknown:
        console.print(f"Not predicted: {traffic.unknown}.")
    elif traffic.equal:
        console.print("Predicted and recorded are equal, call for call and byte for byte.")
    else:
        console.print("[red]Predicted and recorded differ.[/]")


def _grouped(rows: list[dict[str, object]], every: bool) -> dict[tuple[str, str, str, int], int]:
    """Counts by phase, layer (numbers as ``*`` unless ``every``), operation and size."""
    from colrow.inplace.find.styles import pattern_of

    counts: dict[tuple[str, str, str, int], int] = {}
    for row in rows:
        layer = str(row["layer"])
        if not every:
            layer = pattern_of(layer)
        key = (str(row["phase"]), layer, str(row["op"]), int(str(row["bytes"])))
        counts[key] = counts.get(key, 0) + int(str(row["count"]))
    return counts


def _wire(op: str, size: int, ranks: int) -> float:
    from colrow.comm.ledger import Call

    return Call(op, "forward", "", size, "").wire_bytes(ranks)
