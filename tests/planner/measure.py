"""What a training step really takes, measured on this rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record, summarize
from colrow.models.decoder import Decoder
from colrow.planner import Layout, ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that the CPU allocator handed out at once while ``function`` ran, beyond before.

    What a collective's own thread gives back is out of the profiler's sight. Such tensors, and any
    that outlive the function, do not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events: list[tuple[int, int, int]] = []

    def collect(node: Any) -> None:
        if node.tag == _EventType.Allocation:
            fields = node.extra_fields
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
        for child in node.children:
            collect(child)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        collect(root)
    open_at: dict[int, tuple[int, int]] = {}
    changes: list[tuple[int, int]] = []
    for time, pointer, size in sorted(events):
        if size > 0:
            open_at[pointer] = time, size
        elif pointer in open_at:
            began, taken = open_at.pop(pointer)
            changes += [(began, taken), (time, -taken)]
    held = peak = 0
    for _, size in sorted(changes):
        held += size
        peak = max(peak, held)
    return peak


def training_step(
    tp: ParallelGroup, shape: ModelShape, layout: Layout
) -> tuple[Decoder, torch.optim.Optimizer, torch.Tensor]:
    """A model of ours with AdamW, after one step: gradients and states exist."""
    torch.manual_seed(0)
    model = colrow.from_config(
        shape.config,
        tp,
        dtype=DTYPES[layout.precision],
        sequence_parallel=layout.sequence_parallel,
    )
    ids = torch.randint(0, shape.config.vocab_size, (layout.microbatch, layout.sequence))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.loss(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return model, optimizer, ids


def measured(
    tp: ParallelGroup, shape: ModelShape, layout: Layout, times: int = 1
) -> dict[str, Any]:
    """Bytes of weights, gradients, states and activations, and the recorded collectives.

    Args:
        times: how many steps are measured; the activations are those of the smallest peak.
    """
    model, optimizer, ids = training_step(tp, shape, layout)
    parameters = list(model.parameters())
    peaks = []
    for _ in range(times):
        with record(tp) as ledger:
            peaks.append(peak_bytes(lambda: model.loss(ids, ids).backward()))
    states = [t for state in optimizer.state.values() for t in state.values()]
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.grad.numel() * p.grad.element_size() for p in parameters),  # type: ignore[union-attr]
        "optimizer": sum(t.numel() * t.element_size() for t in states),
        "peak": min(peaks),
        "calls": summarize(ledger.calls),
    }
