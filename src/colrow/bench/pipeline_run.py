"""Measures a step of a pipeline: what each rank did when, what it kept and what it sent."""

from __future__ import annotations

import torch
import torch.distributed as dist

from colrow.bench.measure import Progress, device_name, say_nothing
from colrow.bench.pipeline_result import PipelineMeasurement, PipelineSettings
from colrow.comm.ledger import record
from colrow.comm.mesh import Mesh, init_mesh
from colrow.models.build import from_config
from colrow.pipeline.kept_activations import KeptActivations
from colrow.pipeline.limits import ZERO_BUBBLE
from colrow.pipeline.recording import record_step
from colrow.pipeline.runner import PipelineRunner
from colrow.sharding import Sharding

Batch = tuple[torch.Tensor, torch.Tensor, int]


def start(settings: PipelineSettings) -> Mesh:
    """The mesh, on the engine and with the threads that are asked for.

    Communicates: see :func:`colrow.init_mesh`.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return init_mesh(
        tp=settings.tp, pp=settings.pp, dp=1, device=settings.device, engine=settings.engine
    )


def measure_pipeline(
    settings: PipelineSettings, mesh: Mesh, progress: Progress
) -> PipelineMeasurement | None:
    """Measures on all ranks of the mesh, with random weights and tokens.

    Forward and backward of one step, without the optimiser. What autograd keeps and what is sent
    are counted in steps of their own, which are not timed.

    Returns:
        On the first rank of the mesh; None on the others.

    Communicates: the steps, and what they found.
    """
    say = progress if mesh.world.rank == 0 else say_nothing
    say(f"pp={settings.pp} {settings.schedule}: building")
    runner = _runner(settings, mesh)
    batches = _batches(settings, mesh)
    say("warming up")
    for _ in range(settings.warmup):
        _step(runner, batches)
    with record(mesh.pp) as ledger:
        _step(runner, batches)
    sent = [call.bytes for call in ledger.calls if call.op == "send"]
    with KeptActivations(runner.model.parameters()) as kept:
        _step(runner, batches)
    timelines = []
    for index in range(settings.runs):
        say(f"run {index + 1} of {settings.runs}")
        dist.barrier(mesh.pp.group)
        groups = (mesh.tp, mesh.dp)
        with record_step(runner.schedule, runner.stages, *groups, device=mesh.device) as recording:
            _step(runner, batches)
        timelines.append(recording.gather(mesh.pp))
    counts: list[tuple[int, int, int]] = [(0, 0, 0)] * mesh.pp.size
    mine = (kept.peak_bytes, len(sent), sum(sent))
    dist.all_gather_object(counts, mine, group=mesh.pp.group)
    if mesh.world.rank:
        return None
    timelines.sort(key=lambda timeline: timeline.seconds)
    return PipelineMeasurement(
        step=timelines[len(timelines) // 2],
        runs=[timeline.seconds for timeline in timelines],
        kept_bytes=[count[0] for count in counts],
        sent_messages=[count[1] for count in counts],
        sent_bytes=[count[2] for count in counts],
        threads=torch.get_num_threads(),
        engine=mesh.engine.name,
        device=device_name(mesh.device),
    )


def _runner(settings: PipelineSettings, mesh: Mesh) -> PipelineRunner:
    model = from_config(
        settings.config,
        mesh,
        dtype=getattr(torch, settings.dtype),
        sharding=Sharding(settings.sequence_parallel, overlap=settings.schedule not in ZERO_BUBBLE),
        layer_split=settings.split,
        tensor_split=settings.tensor_split,
    ).train()
    return PipelineRunner(
        model,
        mesh,
        settings.schedule,
        microbatches=settings.microbatches,
        microbatch=settings.batch,
        sequence=settings.sequence,
    )


def _batches(settings: PipelineSettings, mesh: Mesh) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    shape = (settings.microbatches, settings.batch, settings.sequence)
    ids = torch.randint(settings.config.vocab_size, shape, generator=generator).to(mesh.device)
    return [(microbatch, microbatch, number) for number, microbatch in enumerate(ids)]


def _step(runner: PipelineRunner, batches: list[Batch]) -> None:
    runner.backward(batches, 1.0)
    for parameter in runner.model.parameters():
        parameter.grad = None
