"""``colrow export``: a Hugging Face directory from a training run."""

from __future__ import annotations

import argparse

from colrow.cli.common import DTYPES, add_json, torch_dtype, write_json, written
from colrow.cli.parser import Parser
from colrow.progress import Progress

HELP = "write a training run's model as a Hugging Face directory"
DESCRIPTION = """\
Writes the model of a checkpoint of RUN, the --output of colrow train, as a directory that
AutoModelForCausalLM.from_pretrained of transformers reads: configuration, tokenizer and weights in
safetensors. The checkpoint's checksums are verified first. One process does it, whatever number of
ranks trained, and whatever architecture it is of.

  colrow export runs/1 my-model
  colrow export runs/1 my-model --step 200 --dtype bf16
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument("run_directory", metavar="RUN", help="the --output of colrow train")
    parser.add_argument("directory", metavar="DIRECTORY", help="to write; must not exist")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint (default the newest)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Exports, and says what."""
    with Progress(f"reading {args.run_directory}") as progress:
        from colrow.any_model.export import write_hf_directory
        from colrow.any_model.loading import load_trained
        from colrow.checkpoint.run_directory import model_files

        model, step = load_trained(args.run_directory, args.step)
        progress.say(f"writing {args.directory}")
        files = model_files(args.run_directory)
        write_hf_directory(model, args.directory, files, torch_dtype(args.dtype))
    if args.json:
        write_json({"directory": args.directory, "step": step, "dtype": args.dtype}, args.json)
    if args.json != "-":
        print(
            f"wrote {args.directory}, the {model.description.name} model after step {step} in "
            f"{args.dtype}: {written(args.directory)}"
        )
        print(f'next: colrow generate {args.directory} "PROMPT"')
    return 0
