"""The machine and one block of a model, measured for ``colrow plan --measure``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from colrow.bench.link_result import LinkSettings, merged_machine
from colrow.bench.link_result import measure as measure_link
from colrow.bench.machine import machine_file
from colrow.bench.measure import measure
from colrow.bench.result import BenchSettings
from colrow.comm.mesh import init_mesh
from colrow.models.config import ModelConfig


@dataclass(frozen=True)
class Here:
    """What was measured.

    Attributes:
        machine: the keys of a machine file.
        block_seconds: forward and backward of one block and one row, the median on the slowest
            rank.
    """

    machine: dict[str, object]
    block_seconds: float


def measure_here(
    config: ModelConfig,
    ranks: int,
    sequence: int,
    dtype: str,
    sequence_parallel: bool,
    progress: Callable[[str], None],
) -> Here | None:
    """Measures links, matmuls, memory and one block on ``ranks`` ranks; every rank calls it.

    Args:
        config: the model, of which one block is built with random weights.
        sequence: tokens of the block's input, one row.
        dtype: of the block, such as "bfloat16".
        progress: told what is being measured, on rank 0.

    Returns:
        On rank 0 the result, None on the others.

    Communicates: what is measured.
    """
    mesh = init_mesh(tp=ranks)
    say = progress if mesh.world.rank == 0 else _nothing
    if ranks > 1:
        settings = LinkSettings(None, "auto", None, seconds_each=0.05, machine=True)
        machine = merged_machine([measure_link(mesh, settings, say)])
    else:
        machine = machine_file(mesh, [], progress=say)
        del machine["link"]
    block = BenchSettings(
        config,
        "block",
        batch=1,
        sequence=sequence,
        sequence_parallel=sequence_parallel and ranks > 1,
        dtype=dtype,
        runs=7,
    )
    found = measure(block, mesh, say)
    return None if found is None else Here(machine, found[0].seconds)


def _nothing(text: str) -> None:
    """Other ranks say nothing."""
