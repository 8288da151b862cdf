"""Who takes part in which workload: a table."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.peers.workloads import Quantised, Training, Workload

# Apart from the environment: transformers imports DeepSpeed wherever it finds it.
PACKAGES = Path(".cache/peers/packages")
LLAMA_CPP = Path(".cache/peers/llama-cpp")


class Running(Protocol):
    """A contestant that has been built, on one rank."""

    def check(self) -> dict[str, list[float]]:
        """Numbers that all contestants of a workload share."""

    def measure(self) -> dict[str, list[float]]:
        """Samples of one turn, in seconds."""


@dataclass(frozen=True)
class Contestant:
    """One way to do a workload.

    Attributes:
        name: key on the command line and in the results.
        label: in tables.
        factory: "module:class" of this package; imported on the ranks alone.
        ranks: processes; each has one thread, but a single process has all cores' threads.
        package: what must be installed beside colrow and its extras, in :data:`PACKAGES` or
            :data:`LLAMA_CPP`.
        variant: takes part in long workloads only when it is named.
    """

    name: str
    label: str
    factory: str
    ranks: int
    package: str = ""
    variant: bool = False

    @property
    def split(self) -> bool:
        """Whether its bytes travel through torch.distributed, on an engine that can be chosen."""
        return self.ranks > 1

    def load(self) -> type[Running]:
        """Its class."""
        if self.package:
            place = LLAMA_CPP if self.package == "llama-cpp" else PACKAGES
            sys.path.append(str(place.absolute()))
        module, name = self.factory.split(":")
        found: type[Running] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return found


TRAINING = (
    Contestant("unsplit", "PyTorch, unsplit", "training:Unsplit", 1),
    Contestant("colrow-1", "colrow, unsplit", "training:Colrow", 1, variant=True),
    Contestant("colrow", "colrow, tp=2", "training:Colrow", 2),
    Contestant(
        "colrow-sp",
        "colrow, tp=2, sequence parallel",
        "training:ColrowSequenceParallel",
        2,
        variant=True,
    ),
    Contestant("dtensor", "DTensor, tp=2", "dtensor:DTensor", 2),
    Contestant(
        "dtensor-sp",
        "DTensor, tp=2, sequence parallel",
        "dtensor:DTensorSequenceParallel",
        2,
        variant=True,
    ),
    Contestant(
        "megatron", "Megatron-Core layers, tp=2", "megatron:Megatron", 2, package="megatron-core"
    ),
)
DECODING = (
    Contestant("unsplit", "transformers, unsplit", "decoding:Transformers", 1),
    Contestant("colrow-1", "colrow, unsplit", "decoding:Colrow", 1),
    Contestant("colrow", "colrow, tp=2", "decoding:Colrow", 2),
    Contestant("transformers-3", "transformers, tp=3", "decoding:TransformersSplit", 3),
    Contestant("deepspeed", "DeepSpeed AutoTP, tp=2", "decoding:DeepSpeed", 2, package="deepspeed"),
)
QUANTISED = (
    Contestant("llama-cpp", "llama.cpp, 2 threads", "quantised:LlamaCpp", 1, package="llama-cpp"),
    Contestant("colrow", "colrow, tp=2", "quantised:Colrow", 2),
)


def contestants(workload: Workload) -> tuple[Contestant, ...]:
    """Those of a workload; the first one's numbers are the reference."""
    if isinstance(workload, Quantised):
        return QUANTISED
    return TRAINING if isinstance(workload, Training) else DECODING
