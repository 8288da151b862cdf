"""``colrow convert``: between Hugging Face directories, GGUF files and training runs."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from colrow.cli.common import DTYPES, torch_dtype, written
from colrow.cli.parser import Parser
from colrow.leftovers import scratch_directory
from colrow.progress import Progress

HELP = "convert between Hugging Face directories, GGUF files and training runs"
DESCRIPTION = """\
Reads SOURCE, a Hugging Face directory, a cached hub id, a .gguf file or the --output of colrow
train, and writes TARGET in the format of --to: "hf" is a Hugging Face directory, "run" the start of
a training run, "gguf" a .gguf file. A quantised file's weights are written as the numbers that they
stand for. A GGUF file takes its tokenizer and its configuration from another GGUF file of the same
architecture, --like, by default SOURCE.

  colrow convert SmolLM2-135M-Instruct.Q4_1.gguf my-model --to hf
  colrow convert runs/1 my-model.gguf --to gguf --like SmolLM2.Q4_1.gguf
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SOURCE", help="what to read")
    parser.add_argument("target", metavar="TARGET", help="what to write; must not exist")
    parser.add_argument(
        "--to", choices=("hf", "run", "gguf"), required=True, metavar="FORMAT", help="hf, run, gguf"
    )
    parser.add_argument("--like", metavar="GGUF", help="for gguf: where the rest comes from")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)"
    )


def run(args: argparse.Namespace) -> int:
    """Converts, and says what."""
    if os.path.lexists(args.target):
        raise ValueError(f"{args.target} exists: choose another name")
    with Progress(f"reading {args.source}") as progress:
        _convert(args, progress)
    print(f"wrote {args.target} from {args.source}: {written(args.target)}")
    return 0


def _convert(args: argparse.Namespace, progress: Progress) -> None:
    from colrow.any_model.export import write_hf_directory, write_training_run
    from colrow.any_model.loading import alone, load_model
    from colrow.checkpoint.run_directory import is_training_run, model_files

    dtype = torch_dtype(args.dtype)
    model = load_model(args.source, alone())
    progress.say(f"writing {args.target}")
    if args.to == "gguf":
        from colrow.checkpoint.export_gguf import write_gguf
        from colrow.models.decoder import Decoder

        if not isinstance(model, Decoder):
            raise ValueError(
                f"--to gguf: {model.description.name} is none of the families that are written so"
            )

        like = args.like or args.source
        if not str(like).endswith(".gguf"):
            raise ValueError("--to gguf needs --like, a .gguf file of the same architecture")
        write_gguf(model, args.target, like, dtype)
        return
    directory = scratch_directory("convert")
    try:
        files = Path(model_files(args.source))
        if not is_training_run(args.source):
            from colrow.train.starting_model import copy_model_files

            files = directory / "files"
            files.mkdir()
            config = getattr(model.module, "config", None)
            tied = getattr(config, "tie_word_embeddings", None)
            copy_model_files(args.source, files, tied=tied)
        if args.to == "hf":
            write_hf_directory(model, args.target, files, dtype)
        else:
            model.module.to(dtype)
            write_training_run(model, args.target, files)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
