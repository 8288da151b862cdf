"""``colrow bench --pp``: what every rank of a pipeline does in a step, and where it waits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from colrow.cli.common import (
    DTYPES,
    add_layer_split,
    announce,
    destination,
    positive_int,
    run_on_ranks,
    say,
    write_json,
)
from colrow.cli.parser import Parser
from colrow.pipeline.schedules import SCHEDULES

if TYPE_CHECKING:
    from rich.console import Console

    from colrow.bench.pipeline_result import PipelineMeasurement, PipelineSettings
    from colrow.models.config import ModelConfig

_ONLY_HERE = ("schedule", "microbatches", "layer_split", "stages_per_rank")


def add_arguments(parser: Parser) -> None:
    """Declares the arguments of pipelines."""
    group = parser.add_argument_group("a step of a pipeline")
    group.add_argument(
        "--pp",
        type=positive_int,
        metavar="N",
        help="ranks of a pipeline of the whole model: shows forward, backward, communication and "
        "idle time of each, as it ran and if messages took no time; --batch and --sequence are "
        "those of a microbatch",
    )
    group.add_argument("--schedule", choices=SCHEDULES, help="(default 1f1b)")
    group.add_argument(
        "--microbatches", type=positive_int, metavar="N", help="of a step (default 2 x pp)"
    )
    add_layer_split(group)
    group.add_argument(
        "--stages-per-rank", type=positive_int, metavar="N", help="of interleaved and zero-bubble"
    )
    group.add_argument(
        "--timeline", type=destination, metavar="FILE", help="draw it (.png, .svg; matplotlib)"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses options that say nothing together.

    Raises:
        ValueError: an option of pipelines without ``--pp``, or one of the rest with it.
    """
    if args.pp is None:
        given = [name for name in (*_ONLY_HERE, "timeline") if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is of a pipeline: give --pp too")
        return
    if args.decode:
        raise ValueError("--pp measures steps of training: leave --decode out")
    if args.what not in (None, "model"):
        raise ValueError(f"--pp runs the whole model: leave --what {args.what} out")
    if args.plot:
        raise ValueError("the picture of a pipeline is --timeline FILE, not --plot")
    if args.tp is not None and len(args.tp) > 1:
        raise ValueError(f"--pp takes one tensor-parallel size, not {len(args.tp)}: --tp N")


def run(args: argparse.Namespace, config: ModelConfig) -> int:
    """Measures and shows."""
    from colrow.bench.pipeline_result import PipelineSettings

    settings = PipelineSettings(
        config=config,
        pp=args.pp,
        tp=args.tp[0] if args.tp else 1,
        schedule=args.schedule or "1f1b",
        microbatches=args.microbatches or 2 * args.pp,
        batch=args.batch,
        sequence=args.sequence,
        layer_split=args.layer_split or "",
        stages_per_rank=args.stages_per_rank or 0,
        tensor_split=args.tensor_split or "",
        sequence_parallel=args.sequence_parallel,
        dtype=DTYPES[args.dtype],
        runs=args.runs,
        threads=args.threads,
        device=args.device,
        engine=args.engine,
    )
    config.divide(settings.tp, settings.tensor_split)
    if args.timeline:
        from colrow.bench.plot import check_picture

        check_picture(args.timeline, "--timeline")
    found = run_on_ranks(_measure, settings, ranks=settings.pp * settings.tp)
    if found is None:
        return 0
    if args.json:
        write_json(found.as_dict(settings), args.json)
    if args.json != "-":
        from rich.console import Console

        _show(Console(highlight=False), settings, found)
    if args.timeline:
        from colrow.pipeline.timeline_plot import plot

        plot(found.step, args.timeline, title=_title(settings))
    return 0


def _measure(settings: PipelineSettings) -> PipelineMeasurement | None:
    from colrow.bench.pipeline_run import measure_pipeline, start

    mesh = start(settings)
    announce(mesh)
    return measure_pipeline(settings, mesh, say)


def _title(settings: PipelineSettings) -> str:
    tp = f" x tp {settings.tp}" if settings.tp > 1 else ""
    shares = f" in {settings.tensor_split} (here rank 0 of tp)" if settings.tensor_split else ""
    return (
        f"{settings.schedule}, pp {settings.pp}{tp}{shares}, {settings.microbatches} microbatches"
    )


def _show(console: Console, settings: PipelineSettings, found: PipelineMeasurement) -> None:
    from colrow.pipeline.timeline_table import show

    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''} a rank"
    console.print(
        f"{_title(settings)} of {settings.batch} x {settings.sequence} tokens, {settings.dtype}, "
        f"layers {', '.join(map(str, settings.split.sizes))} ({found.device}, {threads}, "
        f"{found.engine})",
        soft_wrap=True,
    )
    show(console, found.step)
    expected = settings.expected_bubble_fraction
    if expected is not None:
        console.print(
            f"bubble of {settings.schedule} if all stages, and all three parts of one, cost the "
            f"same: {expected:.1%}",
            soft_wrap=True,
        )
    for rank, kept in enumerate(found.kept_bytes):
        console.print(
            f"rank {rank}: keeps at most {kept / 1e6:.2f} MB of activations, sends "
            f"{found.sent_messages[rank]} messages of {found.sent_bytes[rank] / 1e6:.2f} MB in all",
            soft_wrap=True,
        )
