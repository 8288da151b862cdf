"""``colrow train``: fine-tunes a model, or trains one from a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from typing import TYPE_CHECKING, Any, get_type_hints

from colrow.cli.common import Options, add_json, run_on_ranks, say, warn_of_cores, write_json
from colrow.cli.parser import Parser
from colrow.launch import RankFailure, launch, launched_by, rank_environment
from colrow.progress import Progress
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

  colrow train --model ./Llama-3-8B --data text.txt --output runs/1 --tp 2
  colrow train settings.toml --dp 2 --fsdp --max-restarts 3
  colrow train settings.toml --pp 2 --schedule interleaved --microbatches 8
"""
_SECONDS_TO_SAVE = 120
_STOPPED = 128 + signal.SIGTERM


# The settings under their headings; those of _RARE are left to --help-all.
_GROUPS = {
    "model and data": (
        *("model", "data", "output", "tokenizer", "token_cache", "eval_data", "eval_share"),
        *("eval_every", "eval_sequences"),
    ),
    "layout": (
        *("tp", "dp", "pp", "sequence_parallel", "fsdp", "recompute", "device", "engine"),
        *("tensor_split", "layer_split", "schedule", "stages_per_rank", "in_place"),
    ),
    "batch and steps": (
        *("sequence", "global_batch", "microbatch", "microbatches", "steps", "precision", "seed"),
    ),
    "optimiser and loss": (
        *("optimizer", "learning_rate", "warmup_steps", "final_learning_rate_share", "clip"),
        *("weight_decay", "momentum", "beta1", "beta2", "epsilon", "dropout", "label_smoothing"),
        *("z_loss", "router_balance", "router_z"),
    ),
    "saving and faults": ("save_every", "keep", "log_every", "max_restarts", "timeout_seconds"),
}
_RARE = (
    *("token_cache", "eval_share", "eval_sequences", "engine", "tensor_split", "layer_split"),
    *("schedule", "stages_per_rank", "in_place", "microbatches", "final_learning_rate_share"),
    *("momentum", "beta1", "beta2", "epsilon", "dropout", "label_smoothing", "z_loss", "keep"),
    *("router_balance", "router_z"),
    *("max_restarts", "timeout_seconds"),
)


def add_arguments(parser: Parser) -> None:
    """Declares the arguments: one for each setting."""
    parser.add_argument("settings", metavar="SETTINGS", nargs="?", help="TOML file of settings")
    entries = {entry.name: entry for entry in dataclasses.fields(TrainSettings)}
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_setting(group, entries.pop(name))
    for entry in entries.values():
        _add_setting(parser, entry)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings, the layout, the memory of each rank, what a step sends and the "
        "first batch, then stop",
    )
    add_json(output)
    parser.rare(*_RARE)


def _add_setting(group: Options, entry: dataclasses.Field[Any]) -> None:
    kind = get_type_hints(TrainSettings)[entry.name]
    text = entry.metadata["help"].replace("%", "%%")
    shown = entry.default not in ("", -1.0) and "default" not in text
    default = f" (default {entry.default})" if shown else ""
    common: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS}
    if kind is bool:
        common["action"] = argparse.BooleanOptionalAction
    else:
        common["type"] = kind
        common["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
    if entry.metadata["choices"]:
        common["choices"], common["metavar"] = entry.metadata["choices"], None
    names = ["--" + entry.name.replace("_", "-")]
    if entry.name == "precision":
        names.append("--dtype")
    group.add_argument(*names, help=text + default, **common)


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
    if outcome is None:
        return 0
    if args.json:
        write_json(dataclasses.asdict(outcome), args.json)
    if not outcome.stopped_by:
        say(_ending(settings, outcome))
    return 0


def _ending(settings: TrainSettings, outcome: TrainingOutcome) -> str:
    """What there is now, and the next command."""
    export = f"colrow export {settings.output} DIRECTORY"
    there = f"{settings.output} is at step {outcome.step}; next: "
    from colrow.train.tokenize import BYTES

    if settings.tokenizer == BYTES:  # whose text no tokenizer reads
        return there + export
    return f'{there}colrow generate {settings.output} "PROMPT", or {export}'


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
        with Progress(f"reading {settings.data}"):
            training_and_held_out(settings)  # tokenised before any rank waits for it
        warn_of_cores(settings.ranks)
        with Progress(f"starting {settings.ranks} ranks") as progress:
            progress.hand_over()  # to the first word of rank 0
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
