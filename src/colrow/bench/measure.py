"""Measures subjects on the ranks of one tensor-parallel size."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.profiler import profile, record_function

from colrow.bench.attribution import PREFIX, Kernels, attribute
from colrow.bench.in_place import in_place_subjects
from colrow.bench.result import BenchSettings, Measurement, PhaseTime, median
from colrow.bench.subjects import Subject, decoder_subjects
from colrow.comm.ledger import Ledger, record
from colrow.comm.mesh import Mesh, init_mesh

# The kernels' times hardly vary, and a profile takes long to read.
_PROFILED_RUNS = 5
Progress = Callable[[str], None]


def start(settings: BenchSettings, tp: int) -> Mesh:
    """The mesh of one tensor-parallel size, on the engine and with the threads that are asked for.

    Communicates: see :func:`colrow.init_mesh`.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return init_mesh(tp=tp, device=settings.device, engine=settings.engine if tp > 1 else None)


def measure(settings: BenchSettings, mesh: Mesh, progress: Progress) -> list[Measurement] | None:
    """Measures on the ranks of ``mesh.tp``, all of which call it.

    Three runs each time: as it is, for the totals; with the ledger, for communication; with torch's
    profiler, for matmuls and attention. So no part of the totals is time spent on measuring, and
    whatever else happens on the machine meets all three.

    Args:
        progress: told on rank 0 what happens.

    Returns:
        On rank 0 one measurement for each subject, None on the others.

    Communicates: what is measured, a barrier before each run, and the results.
    """
    tp = mesh.tp.size
    say: Progress = progress if mesh.tp.rank == 0 else say_nothing
    say(f"tp={tp}: building")
    measured = []
    for subject in subjects(settings, mesh):
        phases = _measure_subject(subject, settings, mesh, say)
        by_rank: list[list[PhaseTime]] = [phases]
        if tp > 1:
            gathered: list[list[PhaseTime] | None] = [None] * tp
            dist.all_gather_object(gathered, phases, group=mesh.tp.group)
            by_rank = [found for found in gathered if found is not None]
        measured.append(
            Measurement(
                subject.name,
                tp,
                torch.get_num_threads(),
                mesh.engine.name if tp > 1 else None,
                device_name(mesh.device),
                subject.tokens,
                by_rank,
            )
        )
    return measured if mesh.tp.rank == 0 else None


def _measure_subject(
    subject: Subject, settings: BenchSettings, mesh: Mesh, say: Progress
) -> list[PhaseTime]:
    where = f"tp={mesh.tp.size} {subject.name}"
    say(f"{where}: warming up")
    for _ in range(settings.warmup):
        _run(subject, mesh)
    cuda = mesh.device.type == "cuda"
    names = [phase.name for phase in subject.phases]
    totals: dict[str, list[float]] = {name: [] for name in names}
    profiled: dict[str, list[float]] = {name: [] for name in names}
    ledgers: list[dict[str, Ledger]] = []
    kernels: list[dict[str, Kernels]] = []
    for index in range(settings.runs):
        say(f"{where}: run {index + 1} of {settings.runs}")
        for name, seconds in _run(subject, mesh).items():
            totals[name].append(seconds)
        ledgers.append({})
        _run(subject, mesh, ledgers=ledgers[-1])
        if index < _PROFILED_RUNS:
            with _profiler(cuda) as trace:
                for name, seconds in _run(subject, mesh, marked=True).items():
                    profiled[name].append(seconds)
            kernels.append(attribute(trace.function_events or (), cuda=cuda))
    return [
        _phase_time(
            phase.name,
            phase.count,
            totals[phase.name],
            profiled[phase.name],
            [ledger[phase.name] for ledger in ledgers],
            [found[phase.name] for found in kernels],
        )
        for phase in subject.phases
    ]


def _run(
    subject: Subject,
    mesh: Mesh,
    *,
    ledgers: dict[str, Ledger] | None = None,
    marked: bool = False,
) -> dict[str, float]:
    """One run, all ranks starting together; seconds per call of each phase.

    Args:
        ledgers: filled with each phase's collectives.
        marked: put each phase into the profile.
    """
    if mesh.tp.size > 1:
        dist.barrier(mesh.tp.group)
    seconds: dict[str, float] = {}
    for phase in subject.phases:
        _wait_for_device(mesh)
        started = time.perf_counter()
        if ledgers is not None:
            with record(mesh.tp) as ledgers[phase.name]:
                _repeat(phase.function, phase.count)
        elif marked:
            with record_function(f"{PREFIX}{phase.name}"):
                _repeat(phase.function, phase.count)
                _wait_for_device(mesh)
        else:
            _repeat(phase.function, phase.count)
        _wait_for_device(mesh)
        seconds[phase.name] = (time.perf_counter() - started) / phase.count
    return seconds


def _profiler(cuda: bool) -> profile:
    """torch's profiler, whose library announces every start on standard error below level 6."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return profile(use_kineto=cuda, use_device="cuda" if cuda else None)


def _repeat(function: Callable[[], object], count: int) -> None:
    for _ in range(count):
        function()


def _phase_time(
    name: str,
    count: int,
    totals: list[float],
    profiled: list[float],
    ledgers: list[Ledger],
    kernels: list[Kernels],
) -> PhaseTime:
    """Medians over the runs; per call where the phase has several."""
    exposed = median([ledger.seconds(exposed=True) for ledger in ledgers]) / count
    calls: dict[str, float] = {kind: n / count for kind, n in kernels[0].calls.items()}
    collectives = Counter(call.op for call in ledgers[0].calls)
    calls |= {op: n / count for op, n in collectives.items()}
    return PhaseTime(
        phase=name,
        seconds=median(totals),
        matmul=median([k.seconds["matmul"] for k in kernels]) / count,
        attention=median([k.seconds["attention"] for k in kernels]) / count,
        exposed=exposed,
        hidden=median([ledger.seconds() for ledger in ledgers]) / count - exposed,
        calls=calls,
        runs=totals,
        profiled_seconds=median(profiled),
    )


def _wait_for_device(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


def device_name(device: torch.device) -> str:
    """ "cpu", or what the GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def say_nothing(_: str) -> None:
    """What the other ranks say."""


def subjects(settings: BenchSettings, mesh: Mesh) -> list[Subject]:
    """What the settings ask for, of either kind of model; all ranks call it."""
    if settings.config is None:
        return in_place_subjects(settings, mesh)
    return decoder_subjects(settings, settings.config, mesh)
