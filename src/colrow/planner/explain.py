"""The arithmetic behind a prediction, step by step, as text."""

from __future__ import annotations

from collections import Counter

from colrow.comm.ledger import Call
from colrow.planner.activations import block_bytes
from colrow.planner.block_time import block_time
from colrow.planner.collective_time import (
    collectives,
    stage_message_bytes,
    stage_seconds,
)
from colrow.planner.inference import ServingPrediction, kv_cache_bytes_per_token
from colrow.planner.links import wire_factor
from colrow.planner.model import fullest_rank, held
from colrow.planner.pipeline_time import layers_in_flight
from colrow.planner.placement import collective_seconds, place
from colrow.planner.predict import Prediction
from colrow.planner.roofline import matmul_seconds
from colrow.planner.serving import WEIGHT_BYTES
from colrow.planner.stage_elements import stage_elements


def explain(prediction: Prediction) -> str:
    """Memory, then time, of a training layout; every number with what it is made of."""
    return "\n".join([*_memory(prediction), "", *_time(prediction)])


def _memory(p: Prediction) -> list[str]:
    layout, model, rank = p.layout, p.model, p.memory.fullest
    stage, place = p.memory.fullest_place
    kinds = layout.kinds_of_stages(model)[stage]
    found = stage_elements(model, layout, stage, kinds, place)
    elements = found.total
    flight = layers_in_flight(layout, stage, sum(kinds.values()))
    blocks = " and ".join(
        f"{count} blocks of {held(block, layout.division, place).divided(layout.ep):,}"
        for block, count in kinds.items()
    )
    lines = [
        f"Memory of the fullest rank (stage {stage}, tensor-parallel rank {place})",
        f"  parameters: {blocks} and the ends = {elements:,} of {model.parameters:,}",
        *(
            [f"  frozen       {found.frozen:,} × {layout.frozen_bytes:.4g} B, in the weights"]
            if found.frozen
            else []
        ),
        f"  weights      {elements:,} × {layout.itemsize} B{_over(layout.dp, layout.zero >= 3)}"
        f" = {_gb(rank.weights)}",
        f"  gradients    {elements:,} × {layout.gradient_bytes} B"
        f"{_over(layout.dp, layout.zero >= 2)} = {_gb(rank.gradients)}",
        f"  optimiser    {elements:,} × {layout.state_bytes:g} B"
        f"{_over(layout.dp, layout.zero >= 1)} = {_gb(rank.optimizer)}",
    ]
    block = model.usual_block
    flash = layout.is_flash(block.attention, p.hardware.device.flash_attention)
    kept = block_bytes(block, layout, place, flash=flash)
    if layout.recompute == "full":
        lines.append("  a block keeps only its input; the others are computed again")
    else:
        parts = ", ".join(f"{name} {_mb(size)}" for name, size in kept.items() if size)
        lines.append(f"  a block keeps, per microbatch: {parts}; in all {_mb(sum(kept.values()))}")
    lines += [
        f"  activations  {flight:g} (block, microbatch) pairs in flight, and the ends"
        f" = {_gb(rank.activations)}",
        f"  transient    loss or temporaries, whichever is more = {_gb(rank.transient)}",
        f"  buffers      gathered tensors and messages = {_gb(rank.communication)}",
        f"  reserve      allocator margin, CUDA context, NCCL = {_gb(rank.reserve)}",
        f"  sum          {_gb(rank.total)} of {_gb(p.hardware.device.memory_bytes)}",
    ]
    return lines


def _time(p: Prediction) -> list[str]:
    layout, model, hardware, time = p.layout, p.model, p.hardware, p.time
    device, key = hardware.device, layout.per_microbatch
    block = model.usual_block
    took = block_time(model, block, layout, hardware)
    rate = device.flops(layout.precision) * device.sustained_fraction
    tokens = layout.tokens
    lines = [
        "Time of one step",
        f"  {layout.batch} sequences / ({layout.dp} replicas × microbatch {layout.microbatch}) = "
        f"{layout.num_microbatches} microbatches of {tokens:,} tokens",
        f"  {device.name}: {device.flops(layout.precision) / 1e12:g} TFLOP/s peak, "
        f"{rate / 1e12:.4g} sustained; memory {device.memory_bandwidth / 1e9:g} GB/s × "
        f"{device.stream_fraction:g}",
        "  one block, one microbatch, forward:",
    ]
    for linear in block.linears(layout.division, fullest_rank(block, layout.division)):
        rows = tokens if linear.experts == 1 else tokens * linear.active / linear.experts
        seconds = matmul_seconds(
            device,
            rows,
            linear.outputs,
            linear.inputs,
            precision=layout.precision,
            itemsize=layout.itemsize,
            count=linear.experts,
        )
        flops = 2.0 * rows * linear.outputs * linear.inputs * linear.experts
        lines.append(
            f"    {linear.name:17} [{rows:g}, {linear.inputs}] × [{linear.inputs}, "
            f"{linear.outputs}]: {flops / 1e9:.4g} GFLOP, {_ms(seconds)}"
            f" = {100 * flops / seconds / device.flops(layout.precision):.0f}% of peak"
        )
    forward, backward = took.passes.forward, took.passes.backward
    lines += [
        f"    {'attention':17} {_ms(forward.attention)}",
        f"    {'memory-bound':17} {_ms(forward.elementwise)}",
        f"  backward: matmuls {_ms(backward.matmul)}, attention {_ms(backward.attention)}, "
        f"memory-bound {_ms(backward.elementwise)}, again {_ms(took.passes.recompute.total)}",
    ]
    lines += _collectives(list(collectives(model, block, key).block), p)
    lines.append(
        f"    exposed: {_ms(took.tp_forward.exposed)} of {_ms(took.tp_forward.total)} forward, "
        f"{_ms(took.tp_backward.exposed)} of {_ms(took.tp_backward.total)} backward"
    )
    if layout.pp > 1:
        lines.append(
            f"  between stages: {_mb(stage_message_bytes(model, layout))} per rank, "
            f"{_ms(stage_seconds(model, layout, hardware))} each time"
        )
        lines.append(
            f"  bubble ({layout.schedule}): {layout.pp - 1} stages' forward and backward"
            + (f" / {layout.virtual_stages} chunks" if layout.virtual_stages > 1 else "")
            + f" = {time.pp_bubble:.4g} s"
        )
    if layout.dp > 1:
        lines.append(
            f"  data parallelism: rings over {layout.dp} ranks on "
            f"{place('dp', layout, hardware).nodes} nodes, exposed {time.dp_exposed:.4g} s"
        )
    lines.append("  step: " + " + ".join(f"{value:.4g} {name}" for name, value in parts_of(p)))
    lines.append(f"      = {time.total:.4g} s, {100 * p.utilization:.1f}% model FLOPs utilisation")
    return lines


def parts_of(p: Prediction) -> list[tuple[str, float]]:
    """The parts of a step that are not zero, by name."""
    return [(name.replace("_", " "), value) for name, value in vars(p.time).items() if value > 0]


def _collectives(calls: list[Call], p: Prediction) -> list[str]:
    if not calls:
        return []
    where, tp = place("tp", p.layout, p.hardware), p.layout.tp
    counted = Counter((c.phase, c.op, c.bytes) for c in calls)
    lines = ["  tensor-parallel collectives of a block (the ledger's prediction):"]
    for (phase, op, size), count in counted.items():
        seconds = collective_seconds(op, size, where, p.hardware)
        lines.append(
            f"    {phase:8} {count} × {op} of {_mb(size)}: {wire_factor(op, tp):.3g} × "
            f"{_mb(size)} sent in {_ms(seconds)}"
        )
    return lines


def explain_serving(p: ServingPrediction) -> str:
    """The arithmetic of memory and speed of generation."""
    serving, model, memory = p.serving, p.model, p.fullest
    context = serving.prompt + serving.new_tokens
    per_token = kv_cache_bytes_per_token(model, serving.kv_cache)
    each = WEIGHT_BYTES[serving.weights]
    device = p.hardware.device
    return "\n".join(
        [
            "Memory of the fullest rank",
            f"  weights      {model.parameters:,} × {each:g} B = {_gb(model.parameters * each)} in "
            f"all (ends in 16 bit); here {_gb(memory.weights)}",
            f"  KV cache     {per_token:,} B per token × {context:,} tokens × batch {serving.batch}"
            f" in all layers and ranks; here {_gb(memory.kv_cache)}",
            f"  activations  of the prompt = {_gb(memory.activations)}",
            f"  reserve      {_gb(memory.reserve)}",
            f"  sum          {_gb(memory.total)} of {_gb(device.memory_bytes)}",
            "",
            "One token for every sequence",
            f"  weights      {_gb(memory.weights)} / ({device.memory_bandwidth / 1e9:g} GB/s × "
            f"{device.stream_fraction:g}) or computing: {_ms(p.token.weights)}",
            f"  attention    keys and values read: {_ms(p.token.attention)}",
            f"  tp           all-reduces: {_ms(p.token.tp)}",
            f"  pp           between stages: {_ms(p.token.pp)}",
            f"  launches     {_ms(p.token.launches)}",
            f"  sum          {_ms(p.token.total)}, {p.tokens_per_second:.4g} tokens/s",
            f"Prefill of {serving.prompt:,} tokens × {serving.batch}: {p.prefill_seconds:.4g} s",
        ]
    )


def _over(parts: int, divided: bool) -> str:
    return f" / {parts}" if divided and parts > 1 else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _mb(size: float) -> str:
    return f"{size / 1e6:.4g} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
