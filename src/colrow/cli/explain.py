"""``colrow explain``: a page that shows which rank holds what, and what is sent."""

from __future__ import annotations

import argparse

from colrow.cli.common import (
    DTYPES,
    add_dtype,
    add_sequence_parallel,
    add_tensor_split,
    add_tp,
    destination,
    model_configuration,
    positive_int,
)
from colrow.cli.parser import Parser

HELP = "draw which rank holds what of a model, and what is sent, as a page"
DESCRIPTION = """\
Writes one page that needs nothing else: a block's matrices as they are cut, attention heads,
features and vocabulary rows of each rank, the collectives of a layer in their order with their
bytes, and the bytes of the weights. It is drawn from the descriptions that the layers themselves
are built from, without weights and without ranks, so any size works.

  colrow explain llama-3-8b --tp 4 --html page.html
  colrow explain SmolLM2-135M-Instruct.Q4_1.gguf --tp 2 --html page.html
  colrow explain gpt3-175b --tp 8 --sequence-parallel --html page.html

For a MODEL of an architecture that colrow does not describe, colrow parallelize MODEL --explain
says what would be split, and why.
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hugging Face directory, .gguf file, config.json, hub id that is in the local cache, "
        "or a public model's name such as llama-3-8b",
    )
    parser.add_argument(
        "--html", type=destination, metavar="FILE", required=True, help="the page to write"
    )
    layout = parser.add_argument_group("layout")
    add_tp(layout, default=2)
    add_sequence_parallel(layout)
    add_tensor_split(layout)
    step = parser.add_argument_group("the step whose collectives are listed")
    step.add_argument("--batch", type=positive_int, default=1, metavar="N", help="rows (default 1)")
    step.add_argument(
        "--sequence", type=positive_int, default=2048, metavar="N", help="tokens per row (2048)"
    )
    add_dtype(step, default="bf16")


def run(args: argparse.Namespace) -> int:
    """Writes the page."""
    from colrow.explain.holdings import Question
    from colrow.explain.page import write_page

    config, _ = model_configuration(args.model)
    question = Question(
        args.model.rstrip("/").rpartition("/")[2],
        config,
        config.divide(args.tp, args.tensor_split),
        batch=args.batch,
        sequence=args.sequence,
        sequence_parallel=args.sequence_parallel,
        dtype=DTYPES[args.dtype],
    )
    write_page(args.html, question)
    print(f"wrote {args.html}: {question.name} over {args.tp} ranks; open it in a browser")
    return 0
