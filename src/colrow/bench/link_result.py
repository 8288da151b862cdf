"""What ``colrow bench --link`` measures at one number of ranks, and the machine file of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from colrow.bench.link import Curve, measure_links
from colrow.bench.machine import machine_file
from colrow.comm.mesh import Mesh
from colrow.planner.machine_file import machine_from_mapping


@dataclass(frozen=True)
class LinkSettings:
    """What to measure, and where.

    Attributes:
        device, engine: as :func:`colrow.init_mesh` takes them.
        threads: of each rank; None leaves torch's number.
        seconds_each: how long to time one operation at one size.
        machine: whether matmuls and memory are measured too.
    """

    device: str | None
    engine: str
    threads: int | None
    seconds_each: float
    machine: bool


@dataclass(frozen=True)
class Links:
    """The result.

    Attributes:
        engine: its name and why it was chosen.
        device: "cpu" or "cuda".
        curves: one for each operation.
        machine: the keys of a machine file, where they were asked for.
    """

    engine: str
    device: str
    curves: list[Curve]
    machine: dict[str, object] | None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "engine": self.engine,
            "device": self.device,
            "dtype": "float32",
            "torch": torch.__version__,
            "curves": [curve.as_dict() for curve in self.curves],
        }


def measure(mesh: Mesh, settings: LinkSettings, progress: Callable[[str], None]) -> Links:
    """Measures the links of ``mesh.tp``; the same on every rank.

    Args:
        progress: told what is being measured, on rank 0.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    say = progress if mesh.world.rank == 0 else lambda _: None
    curves = measure_links(mesh, seconds_each=settings.seconds_each, progress=say)
    machine = machine_file(mesh, curves, progress=say) if settings.machine else None
    return Links(str(mesh.engine), mesh.device.type, curves, machine)


def merged_machine(found: Sequence[Links]) -> dict[str, object]:
    """The machine file: the device as the largest number of ranks left it, every link.

    Raises:
        ValueError: when the planner would not take it, as when other processes disturbed the times.
    """
    machines = [links.machine for links in found if links.machine is not None]
    last = max(machines, key=lambda machine: int(str(machine["devices_per_node"])))
    every: list[object] = []
    for machine in machines:
        links = machine["link"]
        every += links if isinstance(links, list) else []
    merged = {**last, "link": every}
    try:
        machine_from_mapping(merged, default_name="machine")
    except ValueError as error:
        raise ValueError(
            f"no machine file was written: {error}; measure again while nothing else runs"
        ) from error
    return merged
