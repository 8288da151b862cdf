"""``colrow train``: fine-tunes a model, or trains one from a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from typing import TYPE_CHECKING, Any, get_type_hints

from colrow.cli.common import add_json, run_on_ranks, say, write_json
from colrow.launch import RankFailure, launch, launched_by, rank_environment
from colrow.train.settings import TrainSettings, load_settings, to_toml

if TYPE_CHECKING:
    from colrow.train.loop import TrainingOutcome

HELP = "fine-tune a model, or train one from a configuration"
DESCRIPTION = """\
Trains on --tp x --dp x --pp ranks and gives the loss curve that one device would give. Every
setting is a key of the TOML file SETTINGS and an option; options win. One of --tp, --dp and --pp
replaces the file's whole layout. The resolved settings,
checkpoints, logs and a plot of the loss are written to --output. A run that finds checkpoints there
continues from the newest, exactly on the same ranks, and up to rounding on others. SIGTERM and
SIGINT (Ctrl-C) save and stop.

The model may be any causal language model of transformers: one that colrow does not describe is
split in place, over --tp and --dp; the first line says so.

  colrow train --model SmolLM2-135M-Instruct.Q4_1.gguf --data text.txt --output runs/1 --tp 2
  colrow train settings.toml --dp 2 --fsdp --max-restarts 3
  colrow train settings.toml --pp 2 --schedule interleaved --microbatches 8 --layer-split 3,1
"""
_SECONDS_TO_SAVE = 120
_STOPPED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments: one for each setting."""
    parser.add_argument("settings", metavar="SETTINGS", nargs="?", help="TOML file of settings")
    types = get_type_hints(TrainSettings)
    for entry in dataclasses.fields(TrainSettings):
        option = "--" + entry.name.replace("_", "-")
        text = entry.metadata["help"].replace("%", "%%")
        shown = entry.default not in ("", -1.0) and "default" not in text
        default = f" (default {entry.default})" if shown else ""
        common: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS}
        if types[entry.name] is bool:
            common["action"] = argparse.BooleanOptionalAction
        else:
            common["type"] = types[entry.name]
            common["metavar"] = {int: "N", float: "X"}.get(types[entry.name], "TEXT")
        if entry.metadata["choices"]:
            common["choices"], common["metavar"] = entry.metadata["choices"], None
        names = [option, "--dtype"] if entry.name == "precision" else [option]
        parser.add_argument(*names, help=text + default, **common)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings, the layout, the memory of each rank, what a step sends and the "
        "first batch, then stop",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, or shows what training would be."""
    names = {entry.name for entry in dataclasses.fields(TrainSettings)}
    overrides = {name: value for name, value in vars(args).items() if name in names}
    environment = rank_environment()
    first = environment is None or environment.rank == 0
    settings = load_settings(args.settings, overrides, say if first else lambda line: None)
    if args.dry_run:
        return _dry_run(settings, args.json)
    try:
        outcome = _train(settings)
    except RankFailure as failure:
        if failure.error_type is None and failure.exit_code == _STOPPED:
            return _STOPPED  # a rank got SIGTERM: all have saved, and said so
        raise
    if outcome is not None and args.json:
        write_json(dataclasses.asdict(outcome), args.json)
    return 0


def _train(settings: TrainSettings) -> TrainingOutcome | None:
    from colrow.train.starting_model import check_settings

    check_settings(settings)
    ranks = settings.ranks
    if ranks == 1 and settings.max_restarts and launched_by() is None:
        raise ValueError(
            "max_restarts needs more than one rank, or torchrun: torchrun --standalone "
            "--nproc-per-node 1 --max-restarts N -m colrow.cli train ..."
        )
    if launched_by() is not None or ranks == 1:
        from colrow.train.loop import train

        return run_on_ranks(train, settings, ranks=ranks)
    from colrow.train.data import training_and_held_out
    from colrow.train.faults import output_held

    with output_held(settings):
        training_and_held_out(settings)  # tokenised before any rank waits for it
        return _launch(settings)


def _launch(settings: TrainSettings) -> TrainingOutcome:
    return launch(
        _train_rank,
        (settings,),
        ranks=settings.ranks,
        max_restarts=settings.max_restarts,
        seconds_to_stop=_SECONDS_TO_SAVE,
        hang_seconds=settings.timeout_seconds,
    )[0]


def _train_rank(settings: TrainSettings) -> TrainingOutcome:
    from colrow.train.loop import train

    outcome = train(settings)
    if outcome.stopped_by:  # nobody waits for results any more: a rank that returned would wait
        sys.exit(_STOPPED)
    return outcome


def _dry_run(settings: TrainSettings, json_file: str | None) -> int:
    from colrow.train.preview import preview

    found = preview(settings)
    if json_file:
        write_json(found.as_dict(), json_file)
    if json_file != "-":
        sys.stdout.write(to_toml(settings))
        sys.stdout.write(found.text() + "\n")
    return 0
