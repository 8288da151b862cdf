"""``colrow plan``: which layout, what it costs, and why."""

from __future__ import annotations

import argparse
import io
from typing import TYPE_CHECKING

from colrow.cli.common import Options, add_json, run_on_ranks, say, write_json
from colrow.cli.parser import Parser

if TYPE_CHECKING:
    from rich.console import Console

    from colrow.planner.hardware import Hardware

CPU_SEQUENCE = 256
_RARE = (
    *("family", "head_dim", "experts", "active_experts", "tied", "gpus_per_node", "cp", "ep"),
    *("virtual_stages", "schedule", "master_weights", "lora_rank", "frozen", "attention"),
    *("software", "stage_layers", "watts", "device_memory", "tensor_split", "top", "plot"),
)

HELP = "say which layout a model needs on which hardware, what it costs, and why"
DESCRIPTION = """\
Plans training, or with --inference generation, before a single device is rented: memory per device,
time per step and where both go. Without --tp, --pp or --dp all layouts are searched.

  colrow plan llama-3-70b --gpus 64 --gpu h100-80gb
  colrow plan gpt3-175b --gpu a100 --tp 8 --pp 12 --dp 4 --recompute full
  colrow plan llama-2-70b --inference --gpu a100 --weights int4
  colrow plan llama-2-13b --inference --device-memory 24,16,8
"""


def add_arguments(parser: Parser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        help="name of a built-in model, or a Hugging Face config.json or directory; or describe "
        "one with --hidden, --layers, --heads and --vocab",
    )
    model = parser.add_argument_group("a model of your own")
    _add_model(model)
    model.add_argument("--list-models", action="store_true", help="show the built-in models")
    _add_hardware(parser.add_argument_group("hardware"))
    _add_layout(parser.add_argument_group("training"))
    _add_inference(parser.add_argument_group("inference"))
    _add_cost(parser.add_argument_group("cost"))
    output = parser.add_argument_group("output")
    output.add_argument("--explain", action="store_true", help="print the arithmetic, step by step")
    output.add_argument("--top", type=int, default=4, metavar="N", help="layouts to compare")
    output.add_argument(
        "--plot",
        metavar="DIRECTORY",
        help="draw memory.png, time.png and scaling.png there (needs matplotlib)",
    )
    output.add_argument(
        "--html",
        metavar="FILE",
        help="write a page to look at: memory, a step as a timeline, every layout considered, what "
        "another node changes",
    )
    add_json(output)
    parser.rare(*_RARE)


def _add_model(group: Options) -> None:
    group.add_argument("--family", default="llama", help="gpt2, llama, mistral, qwen2, qwen3, ...")
    for name, text in (
        ("hidden", "hidden size"),
        ("layers", "transformer blocks"),
        ("heads", "query heads"),
        ("kv-heads", "key-value heads (default: as many as query heads)"),
        ("head-dim", "size of a head"),
        ("ffn", "width of the MLP, or of one expert"),
        ("vocab", "vocabulary size"),
        ("experts", "experts per layer"),
        ("active-experts", "experts per token"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    group.add_argument(
        "--tied", action=argparse.BooleanOptionalAction, help="whether embedding and head are one"
    )


def _add_hardware(group: Options) -> None:
    group.add_argument("--gpus", type=int, metavar="N", help="devices (default 1)")
    group.add_argument("--gpu", default="a100-80gb", metavar="NAME", help="default a100-80gb")
    group.add_argument("--machine", metavar="FILE", help="a TOML or JSON file instead of --gpu")
    group.add_argument(
        "--measure",
        action="store_true",
        help="measure this machine in place of --gpu: links, matmuls, memory and a block of the "
        "model, on --tp ranks (default: on every GPU, or on two ranks of the CPU); about a minute",
    )
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="devices on the fast link")


def _add_layout(group: Options) -> None:
    from colrow.planner.layout import DTYPE, OPTIMIZERS, RECOMPUTE, SCHEDULES
    from colrow.planner.software import SOFTWARE

    for name, text in (
        ("tp", "tensor-parallel size: devices that share each layer"),
        ("pp", "pipeline-parallel size: stages of consecutive layers"),
        ("dp", "data-parallel size: replicas, each with a part of the batch"),
        (
            "cp",
            "context-parallel size: devices that each have a part of every sequence; a search "
            "keeps it (default 1)",
        ),
        ("ep", "expert-parallel size: over how many of the dp × cp replicas experts are divided"),
        ("microbatch", "sequences in one forward pass of a replica"),
        (
            "global-batch",
            "sequences in one step, over all replicas (default: in a search two for each device, "
            "for a given layout a microbatch for each stage and replica)",
        ),
        ("sequence", "tokens of a sequence (default the model's positions, at most 4096)"),
        ("virtual-stages", "stages on each device, of --schedule interleaved"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    group.add_argument(
        "--sequence-parallel",
        action="store_true",
        default=None,
        help="divide norms, dropout and residuals over the sequence",
    )
    group.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        help="activations to compute again in backward: of attention (selective) or whole blocks "
        "(full) (default none)",
    )
    group.add_argument("--schedule", choices=SCHEDULES, help="of the pipeline (default 1f1b)")
    group.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="3 is FSDP (default 0)")
    group.add_argument(
        "--precision", choices=tuple(DTYPE), default="bf16", help="of the matmuls (default bf16)"
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default adamw")
    group.add_argument(
        "--master-weights",
        action=argparse.BooleanOptionalAction,
        help="fp32 gradients and weights beside 16-bit ones (default: yes in 16 bit)",
    )
    group.add_argument(
        "--lora-rank", type=int, default=0, metavar="N", help="train adapters alone, of this rank"
    )
    group.add_argument(
        "--frozen",
        default="",
        metavar="FORMAT",
        help="with --lora-rank: format of the frozen weights; nf4 is QLoRA",
    )
    group.add_argument(
        "--offload-layers",
        type=int,
        default=0,
        metavar="N",
        help="of each stage, layers whose activations wait in the host's memory for backward",
    )
    group.add_argument(
        "--attention",
        choices=("auto", "flash", "unfused"),
        default="auto",
        help="its kernels (default auto: what --software and the device have)",
    )
    group.add_argument(
        "--software",
        choices=tuple(SOFTWARE),
        default="colrow",
        metavar="NAME",
        help=f"whose overlap and kernels: {', '.join(SOFTWARE)} (default colrow)",
    )
    group.add_argument(
        "--stage-layers", metavar="N,N,...", help="layers of each pipeline stage, when uneven"
    )


def _add_cost(group: Options) -> None:
    group.add_argument(
        "--price", type=float, metavar="PER_HOUR", help="of one device for an hour, any currency"
    )
    group.add_argument(
        "--watts", type=float, metavar="W", help="of one device (default: its data sheet's)"
    )
    group.add_argument("--tokens", type=float, metavar="N", help="of the whole run, such as 15e12")


def _add_inference(group: Options) -> None:
    from colrow.planner.serving import KV_BYTES, WEIGHT_BYTES

    group.add_argument("--inference", action="store_true", help="plan generation")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="sequences per replica")
    group.add_argument(
        "--users",
        type=int,
        metavar="N",
        help="how long each of N users of a replica waits, with continuous batching",
    )
    group.add_argument(
        "--token-ms",
        type=float,
        metavar="MS",
        help="how many users a replica serves when 19 of 20 tokens come within this time",
    )
    group.add_argument("--prompt", type=int, metavar="N", help="tokens read (default 1024)")
    group.add_argument("--new-tokens", type=int, default=256, metavar="N", help="(default 256)")
    group.add_argument(
        "--weights", choices=tuple(WEIGHT_BYTES), default="fp16", help="their format (default fp16)"
    )
    group.add_argument(
        "--kv-cache", choices=tuple(KV_BYTES), default="fp16", help="its format (default fp16)"
    )
    group.add_argument(
        "--device-memory",
        metavar="GB,GB,...",
        help="generation on unequal devices: split by memory (training is planned for equal ones)",
    )
    group.add_argument("--tensor-split", metavar="0.5,0.3,0.2", help="shares of unequal devices")


def run(args: argparse.Namespace) -> int:
    """0, or 1 when nothing fits."""
    from rich.console import Console

    from colrow.planner import catalog
    from colrow.planner.command import plan
    from colrow.planner.tables import show_models

    console = Console(highlight=False, file=io.StringIO() if args.json == "-" else None)
    if args.list_models:
        show_models(console, list(catalog().values()))
        return 0
    fits, data = plan(args, console, measured=_measured(args, console) if args.measure else None)
    if args.json:
        write_json(data, args.json)
    return 0 if fits else 1


def _measured(args: argparse.Namespace, console: Console) -> Hardware | None:
    """This machine, measured with a block of the model; None on ranks that have nothing to say."""
    import os

    import torch

    from colrow.bench.here import measure_here
    from colrow.planner.arguments import DEFAULT_SEQUENCE, model_of
    from colrow.planner.layout import DTYPE, Layout
    from colrow.planner.measured import measured_hardware

    for name in ("machine", "inference", "device_memory", "tensor_split"):
        if getattr(args, name):
            option = name.replace("_", "-")
            raise ValueError(f"--measure times a training block here: leave out --{option}")
    model, gpus = model_of(args), torch.cuda.device_count()
    if model.experts > 1:
        raise ValueError(
            f"--measure has no block of {model.name}: it builds blocks without experts"
        )
    ranks = args.tp or (gpus if gpus > 1 else 1 if gpus else min(2, os.cpu_count() or 1))
    sequence = min(model.config.max_positions, args.sequence or DEFAULT_SEQUENCE)
    if not gpus:
        # A short row says what a long one takes, but for attention, and a CPU takes its time.
        sequence = min(sequence, CPU_SEQUENCE)
    block = Layout(
        tp=ranks,
        global_batch=1,
        sequence=sequence,
        precision=args.precision,
        master_weights=False,
        sequence_parallel=bool(args.sequence_parallel) and ranks > 1,
    )
    found = run_on_ranks(
        measure_here,
        model.config,
        ranks,
        sequence,
        DTYPE[args.precision],
        block.sequence_parallel,
        say,
        ranks=ranks,
    )
    if found is None:
        return None
    hardware = measured_hardware(model, found.machine, block, found.block_seconds)
    console.print(
        f"Measured on {ranks} ranks: a block takes {found.block_seconds * 1e3:.3g} ms for "
        f"{sequence} tokens, {hardware.block_factor:.2f} times what matmuls, memory and links "
        "measured alone add up to."
    )
    return hardware
