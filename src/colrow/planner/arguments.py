"""What the arguments of ``colrow plan`` name: model, machine, sizes of a layout."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from colrow.planner.catalog import find_model, shape_of_sizes
from colrow.planner.config_json import model_from_config_json
from colrow.planner.hardware import Hardware, find_hardware
from colrow.planner.layout import Layout
from colrow.planner.machine_file import load_machine
from colrow.planner.model import ModelShape

DEFAULT_SEQUENCE = 4096


def given_sizes(args: Namespace) -> dict[str, int]:
    """The parallel sizes that were given."""
    return {name: n for name in ("tp", "pp", "dp") if (n := getattr(args, name)) is not None}


def layout_sizes(args: Namespace) -> dict[str, int]:
    """The parallel sizes of a given layout; ``--gpus`` decides dp where that is not given."""
    sizes = {"tp": 1, "pp": 1, "dp": 1} | given_sizes(args)
    tp, pp = sizes["tp"] * (args.cp or 1), sizes["pp"]
    if not args.gpus or min(sizes.values()) < 1:
        return sizes
    if args.dp is None:
        sizes["dp"], rest = divmod(args.gpus, tp * pp)
        if rest or not sizes["dp"]:
            raise ValueError(
                f"{args.gpus} devices do not divide by {_product(args, sizes)}: give a multiple of "
                f"{tp * pp} as --gpus, or leave it out"
            )
    dp = sizes["dp"]
    if args.gpus != tp * pp * dp:
        raise ValueError(
            f"{_product(args, sizes, dp)} = {tp * pp * dp}, but --gpus says {args.gpus}"
        )
    return sizes


def _product(args: Namespace, sizes: dict[str, int], dp: int | None = None) -> str:
    """ "tp × cp × pp × dp = 2 × 4 × 1 × 8", without what was not given."""
    factors = {"tp": sizes["tp"], "cp": args.cp, "pp": sizes["pp"], "dp": dp}
    shown = {name: size for name, size in factors.items() if size is not None}
    return f"{' × '.join(shown)} = {' × '.join(str(size) for size in shown.values())}"


def model_of(args: Namespace) -> ModelShape:
    """The model that is named or described."""
    if args.model is not None:
        path = Path(args.model)
        if path.suffix == ".json" or path.is_dir():
            return model_from_config_json(path)
        return find_model(args.model)
    sizes = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "vocab")}
    missing = [f"--{name}" for name, value in sizes.items() if value is None]
    if missing:
        raise ValueError(f"name a model, or describe one; missing {', '.join(missing)}")
    optional = {
        name: value
        for name in ("kv_heads", "head_dim", "ffn", "experts", "active_experts", "tied")
        if (value := getattr(args, name)) is not None
    }
    positions = max(args.sequence or 0, DEFAULT_SEQUENCE)
    return shape_of_sizes("model", args.family, positions=positions, **sizes, **optional)


def hardware_of(args: Namespace, measured: Hardware | None) -> Hardware:
    """The machine that is named or described, or the one that was measured."""
    if measured is not None:
        hardware = measured
    else:
        hardware = load_machine(args.machine) if args.machine else find_hardware(args.gpu)
    if args.gpus_per_node is not None:
        hardware = hardware.with_devices_per_node(args.gpus_per_node)
    return hardware


def layout_of(args: Namespace, model: ModelShape, **sizes: Any) -> Layout:
    """A layout with the workload that was asked for, and these sizes."""
    sequence = args.sequence
    if sequence is None:
        sequence = min(model.config.max_positions, DEFAULT_SEQUENCE)
    return Layout(
        sequence=sequence,
        precision=args.precision,
        optimizer=args.optimizer,
        master_weights=args.master_weights,
        software=args.software,
        attention=args.attention,
        lora_rank=args.lora_rank,
        frozen=args.frozen,
        cp=args.cp or 1,
        offload_layers=args.offload_layers,
        **sizes,
    )


def numbers_of(option: str, text: str | None) -> list[float]:
    """The numbers of an option, with commas between; none where it was not given."""
    if not text:
        return []
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: numbers with commas between are needed") from None
