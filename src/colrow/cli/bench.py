"""``colrow bench``: where the time of a layer, a block or a model goes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from colrow.bench.result import WHAT
from colrow.cli import bench_pipeline
from colrow.cli.bench_model import SIZES, configuration, in_place_model
from colrow.cli.common import (
    DTYPES,
    Options,
    add_device,
    add_dtype,
    add_engine,
    add_json,
    add_sequence_parallel,
    add_tensor_split,
    announce,
    destination,
    positive_int,
    run_on_ranks,
    say,
    write_json,
)
from colrow.cli.parser import Parser

if TYPE_CHECKING:
    from colrow.bench.link_result import Links, LinkSettings
    from colrow.bench.result import BenchSettings, Measurement

HELP = "measure where the time of a layer, a block or a model goes, or the link between ranks"
DESCRIPTION = """\
Runs forward and backward (with --decode: one new token at a time) with random weights on each of
the --tp sizes, and splits each rank's time into matmuls, attention, waiting for communication and
everything else: element-wise work, norms, the optimiser, Python. Communication that ran behind
computing is listed beside them. Totals are medians over --runs with nothing attached that measures.

  colrow bench SmolLM2-135M-Instruct.Q4_1.gguf --what model --tp 1,2 --decode
  colrow bench llama-3-8b --what block --tp 1,2 --plot block.png
  colrow bench --hidden 1024 --layers 4 --heads 16 --vocab 32000 --what model
  colrow bench --hidden 256 --layers 8 --heads 4 --vocab 4096 --pp 4

MODEL may be of any architecture of transformers: one that the decoder does not compute is split in
place. Of such a model --what model, block, attention and mlp can be measured; the last two are the
block's own modules.

With one size for each rank count that you want to compare, the machine's cores are divided by the
ranks (--threads fixes the number), so that sizes are compared on equal hardware.

With --link no model is run: collectives and messages between the ranks are timed by size, as colrow
sends them, on the engine in use.

  colrow bench --link --tp 2 --engine gloo
  colrow bench --link --tp 2 --machine machine.json  # for colrow plan --machine

JSON of --link (--json): for each size of --tp engine, device, dtype, torch and curves, each of op,
ranks, message_bytes, seconds (medians, on the slowest rank), rounds (what they are medians of),
latency_seconds and bytes_per_second (the line through them, where there is one).
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="whose shape to take: Hugging Face directory, cached hub id, .gguf file, config.json, "
        "or a public model's name such as llama-3-8b; or describe one with --hidden, --layers, "
        "--heads and --vocab. A directory or config.json of any other architecture is "
        "transformers' own model, split in place",
    )
    _add_work(parser.add_argument_group("what is measured"))
    _add_ranks(parser.add_argument_group("ranks"))
    bench_pipeline.add_arguments(parser)
    _add_link(parser.add_argument_group("the link between ranks"))
    sizes = parser.add_argument_group("a model of your own")
    for name in SIZES:
        sizes.add_argument(f"--{name}", type=positive_int, metavar="N", help=SIZES[name])
    output = parser.add_argument_group("output")
    add_json(output)
    output.add_argument(
        "--plot", type=destination, metavar="FILE", help="draw it (.png, .svg; needs matplotlib)"
    )
    parser.rare(
        *("in_place", "tensor_split", "engine", "threads", "runs", "seconds", "layer_split"),
        *("stages_per_rank", "timeline", *(name.replace("-", "_") for name in SIZES)),
    )


def _add_work(group: Options) -> None:
    group.add_argument(
        "--what",
        choices=WHAT,
        help="the whole model, one block, its attention or MLP, or each of its linear layers "
        "(layer) (default block)",
    )
    work = group.add_mutually_exclusive_group()
    work.add_argument(
        "--train",
        action="store_true",
        help="forward, backward and, for a model, AdamW (the default)",
    )
    work.add_argument("--decode", action="store_true", help="one new token at a time")
    group.add_argument(
        "--batch", type=positive_int, default=1, metavar="N", help="rows (default 1)"
    )
    group.add_argument(
        "--sequence",
        type=positive_int,
        default=128,
        metavar="N",
        help="tokens per row; with --decode those before the new one (default 128)",
    )
    add_dtype(group)
    group.add_argument(
        "--runs", type=positive_int, default=10, metavar="N", help="timed runs (default 10)"
    )
    group.add_argument(
        "--in-place",
        action="store_true",
        help="split transformers' own model in place, also where the decoder knows the family",
    )


def _add_ranks(group: Options) -> None:
    group.add_argument(
        "--tp",
        type=_sizes,
        metavar="N,N",
        help="tensor-parallel sizes, one after the other (default 1,2; with --pp 1)",
    )
    add_sequence_parallel(group)
    add_tensor_split(group)
    add_device(group)
    add_engine(group)
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="of each rank (default cores / ranks)"
    )


def _add_link(group: Options) -> None:
    group.add_argument(
        "--link",
        action="store_true",
        help="time all-reduce, all-gather, reduce-scatter, broadcast and messages instead",
    )
    group.add_argument(
        "--seconds",
        type=float,
        default=0.2,
        metavar="S",
        help="with --link: how long to time one operation at one size (default 0.2)",
    )
    group.add_argument(
        "--machine",
        type=destination,
        metavar="FILE.json",
        help="with --link: measure matmuls and memory too, and describe this machine for colrow "
        "plan --machine",
    )


def run(args: argparse.Namespace) -> int:
    """Measures each size and prints."""
    if args.link:
        return _run_links(args)
    if args.machine:
        raise ValueError("--machine describes what --link measures: give both")
    from colrow.bench.result import BenchSettings

    bench_pipeline.check_arguments(args)
    in_place = in_place_model(args)
    config = None if in_place else configuration(args)
    if args.pp is not None and config is not None:
        return bench_pipeline.run(args, config)
    settings = BenchSettings(
        config=config,
        what=args.what or "block",
        batch=args.batch,
        sequence=args.sequence,
        decode=args.decode,
        sequence_parallel=args.sequence_parallel,
        tensor_split=args.tensor_split,
        dtype=DTYPES[args.dtype],
        runs=args.runs,
        threads=args.threads,
        device=args.device,
        engine=args.engine,
        in_place=in_place,
    )
    sizes = args.tp or (1, 2)
    if config is not None:
        for size in sizes:
            config.divide(size, settings.tensor_split_of(size))
    if args.plot:
        from colrow.bench.plot import check_picture

        check_picture(args.plot)
    found: list[Measurement] = []
    for size in sizes:
        measured = run_on_ranks(_measure, settings, size, ranks=size)
        if measured is None:
            return 0
        found += measured
    if args.json:
        write_json(_as_dict(settings, found), args.json)
    if args.json != "-":
        from rich.console import Console

        from colrow.bench.show import show

        show(Console(highlight=False), settings, found)
    if args.plot:
        from colrow.bench.plot import plot

        plot(found, args.plot)
    return 0


def _measure(settings: BenchSettings, size: int) -> list[Measurement] | None:
    from colrow.bench.measure import measure, start

    mesh = start(settings, size)
    announce(mesh)
    return measure(settings, mesh, say)


def _run_links(args: argparse.Namespace) -> int:
    """Times the engine at each size of --tp that has a link."""
    given = {
        "MODEL": args.model,
        "--decode": args.decode,
        "--train": args.train,
        "--sequence-parallel": args.sequence_parallel,
        "--plot": args.plot,
        "--pp": args.pp,
        **{f"--{name}": getattr(args, name.replace("-", "_")) for name in SIZES},
    }
    ignored = [name for name, value in given.items() if value]
    if ignored:
        raise ValueError(f"--link runs no model: leave out {', '.join(ignored)}")
    sizes = [size for size in args.tp or (1, 2) if size > 1]
    if not sizes:
        raise ValueError("a link has two ends: use --tp 2 or more")
    if args.machine and not args.machine.endswith(".json"):
        raise ValueError(f"--machine {args.machine}: the file's name must end in .json")
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: must be positive")
    from colrow.bench.link_result import LinkSettings, merged_machine

    settings = LinkSettings(
        args.device, args.engine, args.threads, args.seconds, bool(args.machine)
    )
    found: list[Links] = []
    for size in sizes:
        links = run_on_ranks(_measure_links, settings, size, ranks=size)
        if links is None:
            return 0
        found.append(links)
    if args.json:
        write_json([links.as_dict() for links in found], args.json)
    if args.json != "-":
        from rich.console import Console

        from colrow.bench.link_table import show_links

        for links in found:
            show_links(Console(highlight=False), links.curves, links.engine)
    if args.machine:
        write_json(merged_machine(found), args.machine)
    return 0


def _measure_links(settings: LinkSettings, size: int) -> Links:
    from colrow.bench.link_result import measure
    from colrow.comm.mesh import init_mesh

    mesh = init_mesh(tp=size, device=settings.device, engine=settings.engine)
    announce(mesh)
    return measure(mesh, settings, say)


def _as_dict(settings: BenchSettings, found: list[Measurement]) -> dict[str, object]:
    from colrow.bench.result import speedups

    faster = speedups(found)
    return {
        "settings": asdict(settings),
        "measurements": [
            {**m.as_dict(), "speedup_over_one_process": faster.get((m.subject, m.tp))}
            for m in found
        ],
    }


def _sizes(text: str) -> tuple[int, ...]:
    """An argparse type: "1,2,4"."""
    sizes = tuple(positive_int(part) for part in text.split(","))
    if len(set(sizes)) < len(sizes):
        raise argparse.ArgumentTypeError(f"{text!r} names a size twice")
    return sizes
