"""``colrow zoo``: every architecture of transformers, split and compared."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from colrow.cli.common import add_json, destination, positive_int
from colrow.cli.parser import Parser

HELP = "in a clone: split a tiny model of every architecture and compare it with the whole one"
DESCRIPTION = """\
Builds a tiny model with random weights of every architecture that the installed transformers has
(all its causal language models, and the best-known encoders, encoder-decoders and vision models),
splits it with colrow.parallelize and compares logits, loss, the gradient of every parameter and
greedy generation with the unsplit model, in fp64, to 1e-10. Sizes are awkward on purpose: 5 heads,
or 6 over 2 or 3 KV heads, odd MLPs, a vocabulary of 97. Each architecture ends as passed, refused
with a reason, or failed; the share is that of the weights of attention, MLPs, embedding and head
which were spread over the ranks. Exits with 1 when one failed.

The column generate is another run, at the first of the --tp sizes: every causal language model is
saved, loaded as colrow generate loads it, and passes when it continues two prompts in one batch
with the tokens that transformers gives each of them alone.

  colrow zoo --only llama,gpt2,mixtral --tp 2,3
  colrow zoo --against transformers --markdown docs/zoo.md
  colrow zoo --resume zoo.jsonl                # goes on where a run ended
"""


def add_arguments(parser: Parser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--only",
        type=lambda text: [name for name in text.split(",") if name],
        metavar="NAMES",
        help='model types, separated by commas, such as "llama,gpt2" (default: all)',
    )
    parser.add_argument(
        "--tp",
        type=_sizes,
        default=[2, 3],
        metavar="N,N",
        help="tensor-parallel sizes, separated by commas (default 2,3)",
    )
    parser.add_argument(
        "--against",
        choices=["transformers"],
        help="also compare transformers' own tensor parallelism, on the same models and on models "
        "whose sizes all divide by 2 and 3",
    )
    parser.add_argument(
        "--seconds",
        type=positive_int,
        default=60,
        metavar="S",
        help="count an architecture as failed after S seconds (default 60)",
    )
    parser.add_argument(
        "--resume",
        type=destination,
        metavar="FILE",
        help="keep every outcome in FILE as it comes, and take those that it holds from there",
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--markdown",
        type=destination,
        metavar="FILE",
        help="write the scoreboard into FILE, in place of the one that it may have",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Hands over to ``benchmarks/zoo`` of the clone that this package is installed from.

    Raises:
        ValueError: the package was installed without it.
    """
    if args.list:
        from colrow.tiny_models.architectures import architectures

        print("\n".join(a.name for a in architectures(args.only)))
        return 0
    root = Path(__file__).parents[3]
    if not (root / "benchmarks" / "zoo" / "command.py").is_file():
        raise ValueError(
            "the zoo measures colrow and is no part of the installed package: run it in a clone of "
            "the repository, installed by `pip install -e .`; `colrow verify --architecture NAME` "
            "compares a single architecture"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))
    code: int = import_module("benchmarks.zoo.command").run(args)
    return code


def _sizes(text: str) -> list[int]:
    """An argparse type: tp sizes of at least 2."""
    sizes = [int(word) if word.isdigit() else 0 for word in text.split(",")]
    if min(sizes) < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers of at least 2, such as 2,3: one rank holds "
            "the whole model"
        )
    return sizes
