"""Which model ``colrow bench`` measures: a described one by its shape, or one split in place."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from colrow.cli.common import model_configuration, say

if TYPE_CHECKING:
    from colrow.models.config import ModelConfig

SIZES = {
    "hidden": "hidden size",
    "layers": "transformer blocks",
    "heads": "query heads",
    "kv-heads": "key-value heads (default: as many as query heads)",
    "ffn": "width of the MLP",
    "vocab": "vocabulary size",
}


def in_place_model(args: argparse.Namespace) -> str:
    """The model that is to be split in place; "" for one that the decoder computes.

    Raises:
        ValueError: options that only the decoder has.
    """
    from colrow.any_model.loading import describe_model, known_to_decoder

    try:
        if args.model is None or (not args.in_place and known_to_decoder(args.model)):
            return ""
    except ValueError:  # no checkpoint: a public model's name, or one that nobody knows
        return ""
    known = describe_model(
        args.model,
        pp=1 if args.pp is None else max(2, args.pp),
        in_place=True,
        tensor_split=args.tensor_split,
    )
    say(known.says)
    return str(args.model)


def configuration(args: argparse.Namespace) -> ModelConfig:
    """The named model's, or that of the sizes given."""
    sizes = {name: getattr(args, name.replace("-", "_")) for name in SIZES}
    given = [f"--{name}" for name, value in sizes.items() if value is not None]
    if args.model is not None:
        if given:
            raise ValueError(f"{', '.join(given)} describe a model, and {args.model} is one too")
        config, _ = model_configuration(args.model)
        return config
    missing = [f"--{name}" for name in ("hidden", "layers", "heads", "vocab") if not sizes[name]]
    if missing:
        raise ValueError(f"name a model, or describe one; missing {', '.join(missing)}")
    from colrow.planner.catalog import shape_of_sizes

    values = {name.replace("-", "_"): value for name, value in sizes.items()}
    return shape_of_sizes("model", "llama", positions=max(2048, args.sequence), **values).config
