"""Why one layout is better than another, in sentences."""

from __future__ import annotations

from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape
from colrow.planner.placement import place
from colrow.planner.predict import Prediction

PART_NAMES = {
    "matmul": "matmuls",
    "attention": "attention",
    "elementwise": "memory-bound work",
    "recompute": "recomputation",
    "launches": "waiting for the host",
    "stragglers": "waiting for the slowest device",
    "tp_exposed": "exposed tensor-parallel communication",
    "cp_exposed": "exposed context-parallel communication",
    "ep_exposed": "tokens sent to experts",
    "pp_bubble": "pipeline bubble",
    "pp_transfer": "transfers between stages",
    "dp_exposed": "exposed data-parallel communication",
    "offload": "copies to the host and back",
    "optimizer": "the optimiser",
}


def why_first(first: Prediction) -> str:
    """Why this layout, in sentences."""
    layout, hardware, model = first.layout, first.hardware, first.model
    device = hardware.device
    states = first.memory.fullest.model_states / 1e9
    sentences = []
    if layout.zero == 3:
        sentences.append(
            f"Each of the {layout.dp} devices keeps {states:.1f} GB of weights, gradients and "
            "optimiser, and gathers the weights of a block when it needs them."
        )
    elif layout.tp == layout.pp == 1:
        sentences.append(
            f"The model fits on one {device.name} ({first.memory_bytes_per_rank / 1e9:.1f} of "
            f"{device.memory_bytes / 1e9:.0f} GB), so it is not cut"
            + (f"; {layout.dp} replicas share the batch." if layout.dp > 1 else ".")
        )
    else:
        whole = _whole_states(model, layout) / 1e9
        sentences.append(
            f"Weights, gradients and optimiser of one replica are {whole:.0f} GB; cut into "
            f"{layout.tp * layout.pp} parts{_zero_text(layout)}, {states:.1f} GB of them are on a "
            f"device, which has {device.memory_bytes / 1e9:.0f} GB."
        )
    if layout.tp > 1:
        if place("tp", layout, hardware).nodes == 1:
            sentences.append(
                f"Tensor parallelism of {layout.tp} stays inside a node of "
                f"{hardware.devices_per_node}, on its fast link."
            )
        else:
            sentences.append(
                f"Tensor parallelism of {layout.tp} leaves the node of "
                f"{hardware.devices_per_node}, because nothing smaller fits."
            )
    if layout.pp > 1:
        share = first.time.pp_bubble / first.step_seconds
        sentences.append(
            f"{layout.pp} pipeline stages with {layout.num_microbatches} microbatches each leave "
            f"devices idle {100 * share:.0f}% of the time."
        )
    if layout.recompute == "full":
        sentences.append(
            "Blocks are computed again in backward, because their activations would not fit."
        )
    return " ".join(sentences)


def _zero_text(layout: Layout) -> str:
    return f" and ZeRO-{layout.zero} over {layout.dp} replicas" if layout.zero else ""


def _whole_states(model: ModelShape, layout: Layout) -> float:
    each = layout.itemsize + layout.gradient_bytes + layout.state_bytes
    return model.parameters * each


def what_loses(first: Prediction, other: Prediction) -> str:
    """What ``other`` loses against ``first``, in a sentence."""
    slower = other.step_seconds - first.step_seconds
    if slower <= 0:
        return (
            f"{other.layout.describe()} is as fast within what can be predicted, but cuts the "
            "model more."
        )
    differences = {
        name: getattr(other.time, name) - getattr(first.time, name) for name in PART_NAMES
    }
    largest = sorted(differences, key=lambda name: -abs(differences[name]))
    notable = [name for name in largest[:4] if abs(differences[name]) > 0.1 * slower]
    listed = ", ".join(f"{differences[name]:+.3g} s {PART_NAMES[name]}" for name in notable)
    share = 100 * slower / first.step_seconds
    sentence = f"{other.layout.describe()} takes {share:.0f}% longer: {listed}."
    if other.is_as_fast_as(first):
        sentence += " That is less than the prediction can tell: measure both."
    return sentence
