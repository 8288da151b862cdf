"""What several commands share: their options, starting the ranks, and the JSON they write."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from colrow import progress
from colrow.launch import available_cores, launch, rank_environment
from colrow.text import bytes_text

if TYPE_CHECKING:
    import torch

    from colrow.comm.mesh import Mesh
    from colrow.models.config import ModelConfig

T = TypeVar("T")
Options = argparse._ActionsContainer  # a parser, or a group of its options

_FILES_SHOWN = 6
DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}


def add_tp(parser: Options, *, default: int = 1) -> None:
    """``--tp N``."""
    parser.add_argument(
        "--tp",
        type=positive_int,
        default=default,
        metavar="N",
        help="tensor-parallel size: over how many ranks every layer's weights are split; each "
        "rank holds about 1/N of them. Any N works, whether heads, vocabulary and MLP divide by it "
        "or not, up to the number of query heads (and of MLP features and vocabulary, which are "
        f"more in real models) (default {default})",
    )


def add_pipeline(parser: Options) -> None:
    """``--pp N`` and ``--layer-split``."""
    parser.add_argument(
        "--pp",
        type=positive_int,
        default=1,
        metavar="N",
        help="pipeline-parallel size: over how many stages the layers are divided, each on --tp "
        "ranks (default 1)",
    )
    add_layer_split(parser)


def add_layer_split(parser: Options) -> None:
    """``--layer-split``; ``args.layer_split`` is None for the balanced one."""
    parser.add_argument(
        "--layer-split",
        metavar="SPLIT",
        help="layers of each rank of the pipeline, such as 20,10, or shares of them, such as 2,1 "
        "or 0.5,0.3,0.2 (default: so that all ranks take equally long)",
    )


def add_in_place(parser: Options) -> None:
    """``--in-place`` and ``--trust-remote-code``."""
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="split transformers' own model in place, also where the decoder knows the family",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with MODEL, for an architecture that transformers "
        "lacks: it can do anything that you can (default: such a model is refused)",
    )


def add_tensor_split(parser: Options) -> None:
    """``--tensor-split``; ``args.tensor_split`` is None for even shares."""
    parser.add_argument(
        "--tensor-split",
        metavar="RATIO",
        help="the ranks' shares of every tensor, for devices of unequal memory: one number for "
        "each rank of --tp, such as 2,1 or 0.5,0.3,0.2. Query heads, MLP features and vocabulary "
        "are divided in this ratio, each to the nearest whole one (default: equal shares)",
    )


def add_sequence_parallel(parser: Options) -> None:
    """``--sequence-parallel``."""
    parser.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="split norms, dropout and residuals over the sequence too: each block's two "
        "all-reduces become two all-gathers and two reduce-scatters, which send the same bytes, "
        "and the activations between the layers shrink to 1/N",
    )


def add_json(parser: Options) -> None:
    """``--json FILE``."""
    parser.add_argument(
        "--json",
        type=destination,
        metavar="FILE",
        help='also write the result as JSON, for a program; "-" writes it to standard output '
        "instead of the text; NaN and Inf are null",
    )


def add_device(parser: Options) -> None:
    """``--device``; ``args.device`` is None for auto, as :func:`colrow.init_mesh` takes it."""
    parser.add_argument(
        "--device",
        type=lambda name: None if name == "auto" else name,
        default=None,
        metavar="DEVICE",
        help="where the ranks compute: cpu, cuda (rank i of a host on its GPU i), or auto, CUDA "
        "where each rank of the host has a GPU and else the CPU (default auto)",
    )


def add_engine(parser: Options) -> None:
    """``--engine``."""
    parser.add_argument(
        "--engine",
        choices=("auto", "mpi", "gloo", "nccl"),
        default="auto",
        help="what carries the bytes between ranks: nccl for GPUs; for CPU ranks mpi, through the "
        "shared memory of one host, or gloo, through sockets; auto takes mpi where the cpu extra "
        "is installed and each rank has a core (default auto)",
    )


def say(text: str) -> None:
    """One line of progress, on standard error."""
    progress.say(f"... {text}")


def announce(mesh: Mesh) -> None:
    """The start-up line, on rank 0: how many ranks, where, and what carries their bytes."""
    if mesh.world.rank == 0 and mesh.world_size > 1:
        say(f"{mesh.world_size} ranks on {mesh.device.type}, engine {mesh.engine}")


def add_dtype(parser: Options, *, default: str = "fp32") -> None:
    """``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default,
        help="number format of weights and activations. fp64 is the sharpest check: a split model "
        "agrees to 1e-12 there and a bug cannot hide in rounding; bf16 and fp16 halve fp32's "
        f"memory and bytes sent (default {default})",
    )


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a ``--dtype``."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def model_configuration(name: str) -> tuple[ModelConfig, bool]:
    """A model's configuration, and whether there are weights to run it with.

    Args:
        name: Hugging Face directory, cached hub id, .gguf file, config.json, or a public model's
            name.

    Raises:
        ValueError: there is no such model.
    """
    path = Path(name)
    if path.suffix == ".json" or (path.is_dir() and not _weights(path)):
        from colrow.models.hf_config import config_from_file

        return config_from_file(path), False
    if not path.exists() and "/" not in name and path.suffix != ".gguf":
        from colrow.checkpoint.locate import cached_snapshot
        from colrow.planner.catalog import find_model

        cached, tried = cached_snapshot(name)
        if cached is None:
            try:
                return find_model(name).config, False
            except ValueError as error:
                raise ValueError(
                    f"{error}. There is no such file or directory, and {tried}"
                ) from None
    from colrow.checkpoint.pretrained import pretrained_config

    return pretrained_config(name), True


def _weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors*")) or any(directory.glob("*.bin"))


def run_on_ranks(function: Callable[..., T], *args: object, ranks: int) -> T | None:
    """Runs ``function(*args)`` on every rank, started here unless somebody started them already.

    Returns:
        Rank 0's result; None on the other ranks of torchrun, mpiexec or srun, which have nothing
        to print.

    Raises:
        ValueError: when another launcher started a number of ranks that is not ``ranks``.
        RankFailure: when a rank failed.
    """
    environment = rank_environment()
    if environment is None:
        warn_of_cores(ranks)
        with progress.Progress(f"starting {ranks} ranks", active=ranks > 1) as line:
            line.hand_over()  # to the first word of rank 0
            return launch(function, args, ranks=ranks)[0]
    if environment.world_size != ranks:
        raise ValueError(
            f"{environment.launcher} started {environment.world_size} ranks, but the sizes that "
            f"are asked for (--tp and others) make {ranks}: make them the same{environment.remedy}"
        )
    result = function(*args)
    return result if environment.rank == 0 else None


def warn_of_cores(ranks: int) -> None:
    """Says what it means when this machine has fewer cores than ranks are started."""
    cores = available_cores()
    if ranks > cores:
        shared = "one core" if cores == 1 else f"{cores} cores"
        say(f"{ranks} ranks share {shared} and wait for each other: ask for {cores} to be faster")


def destination(text: str) -> str:
    """An argparse type: a file that can be written, said before the work and not after it."""
    if text != "-" and not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory for {text}")
    return text


def written(path: str | Path) -> str:
    """What is in a file or a directory, for the person who had it written: names and sizes."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    shown = [f"{f.name} ({bytes_text(f.stat().st_size)})" for f in files[:_FILES_SHOWN]]
    more = len(files) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


class _Report(Protocol):
    @property
    def passed(self) -> bool: ...

    def as_dict(self) -> dict[str, Any]: ...


def conclude(report: _Report, args: argparse.Namespace, show: Callable[[], None]) -> int:
    """Writes a report where ``--json`` says, shows it unless that is the screen; the exit code."""
    if args.json:
        write_json(report.as_dict(), args.json)
    if args.json != "-":
        show()
    return 0 if report.passed else 1


def write_json(data: object, file: str) -> None:
    """Writes ``data`` to the file, or to standard output for "-"; NaN and Inf become null."""
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")


def _finite(data: object) -> object:
    """The same with None for the numbers that JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
