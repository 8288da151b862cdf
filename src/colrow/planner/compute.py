"""Time of one transformer block, of the embedding and of the head on one rank: no communication."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from colrow.layers.describe import AttentionSpec, BlockSpec, ExpertsSpec, Linear
from colrow.planner.attention_time import attention_pass
from colrow.planner.hardware import Device
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape, fullest_rank, held, key_value_numbers
from colrow.planner.passes import Pass, Seconds
from colrow.planner.roofline import matmul_seconds, stream_seconds

# Read and written per logit by the loss and its backward, beyond the matmul: to fp32 (2 read, 4
# written), maximum (4), subtract (8), exponential (8), sum (4), divide (8); backward multiplies (8)
# and converts (4, 2). Megatron-LM's and colrow's vocabulary-parallel cross entropy.
LOSS_BYTES = 52.0


@lru_cache(maxsize=4096)
def block_pass(block: BlockSpec, layout: Layout, device: Device) -> Pass:
    """One block, one microbatch, on the fullest rank.

    ``layout``'s pp, dp and batch do not enter; callers that search pass a reduced layout.
    """
    rank = fullest_rank(block, layout.division)
    forward = backward = Seconds()
    for linear in block.linears(layout.division, rank):
        f, dgrad, wgrad = _layer_seconds(layout, device, linear)
        forward += Seconds(matmul=f)
        backward += Seconds(matmul=dgrad + wgrad, weight_gradients=wgrad)
    copied = _copied_bytes(block, layout, rank)
    forward += Seconds(elementwise=stream_seconds(device, copied[0]))
    backward += Seconds(elementwise=stream_seconds(device, copied[1]))
    attention = attention_pass(block, layout, device, rank)
    elementwise = _elementwise(block, layout, device, rank)
    forward += attention.forward + elementwise.forward
    backward += attention.backward + elementwise.backward
    if layout.recompute == "full":
        return Pass(forward, backward, forward)
    if layout.recompute == "selective":
        return Pass(forward, backward, attention.forward)
    return Pass(forward, backward)


def _layer_seconds(layout: Layout, device: Device, linear: Linear) -> tuple[float, float, float]:
    """A linear layer's matmuls, as :func:`_linear_seconds`, with its adapter where it has one.

    A frozen weight has no gradient. Its adapter is two thin layers, one after the other.
    """
    f, dgrad, wgrad = _linear_seconds(layout, device, linear)
    if not layout.lora_rank:
        return f, dgrad, wgrad
    wgrad, thin = 0.0, layout.lora_rank
    for inputs, outputs in ((linear.inputs, thin * linear.parts), (thin, linear.outputs)):
        layer = replace(linear, inputs=inputs, outputs=outputs)
        more = _linear_seconds(layout, device, layer)
        f, dgrad, wgrad = f + more[0], dgrad + more[1], wgrad + more[2]
    return f, dgrad, wgrad


def _copied_bytes(block: BlockSpec, layout: Layout, rank: int) -> tuple[float, float]:
    """Bytes moved to change the format of what is multiplied, forward and backward."""
    forward = backward = 0.0
    if layout.lora_rank and layout.frozen_bytes != layout.itemsize:
        # Quantised weights are read, and written wide, before the matmuls of either pass.
        weights = held(block, layout.division, rank).divided(layout.ep)
        forward = backward = weights * (layout.frozen_bytes + layout.itemsize)
    if layout.precision == "fp8":
        for linear in block.linears(layout.division, rank):
            more = _narrowing_bytes(layout, linear)
            forward, backward = forward + more[0], backward + more[1]
    return forward, backward


def _narrowing_bytes(layout: Layout, linear: Linear) -> tuple[float, float]:
    """Bytes moved to turn a linear layer's 16-bit matrices into 8-bit ones, forward and backward.

    Each is read for its largest number and read again, written once as it is and once transposed
    for the backward matmuls: the input and the weight forward, the gradient of the output backward
    (Micikevicius et al. 2022, arXiv 2209.05433; dynamic scaling of torchao). Transformer Engine
    writes them in the kernels that make them, and narrows weights once a step.
    """
    rows, weights = float(layout.tokens * linear.active), 0.0
    each = 2.0
    if not layout.program.fused_narrowing:
        each += 2 * layout.itemsize
        weights = linear.inputs * linear.outputs
        weights *= linear.experts / layout.ep if linear.active > 1 else 1
    return each * (rows * linear.inputs + weights), each * rows * linear.outputs


def _linear_seconds(layout: Layout, device: Device, linear: Linear) -> tuple[float, float, float]:
    """Forward, gradient of the input, gradient of the weight."""
    experts, tokens = linear.experts > 1, layout.tokens
    rows = tokens * layout.ep * linear.active / linear.experts if experts else tokens

    def seconds(m: float, n: float, k: float) -> float:
        took = matmul_seconds(
            device,
            m,
            n,
            k,
            precision=layout.precision,
            itemsize=1 if layout.precision == "fp8" else layout.itemsize,
            count=linear.experts / layout.ep if experts else 1,
        )
        return took / device.grouped_share if experts else took

    return (
        seconds(rows, linear.outputs, linear.inputs),
        seconds(rows, linear.inputs, linear.outputs),
        seconds(linear.inputs, linear.outputs, rows),
    )


def _elementwise(block: BlockSpec, layout: Layout, device: Device, rank: int) -> Pass:
    """Everything that is limited by memory: bytes read and written, kernel by kernel."""
    size, fused, tokens = layout.itemsize, layout.program.fused_elementwise, layout.tokens
    attention, division = block.attention, layout.division
    rows = -(-tokens // layout.tp) if layout.sequence_parallel else tokens
    residual = rows * block.hidden_size * size
    mask = 1 / size if block.dropout > 0 else 0.0
    # A norm: read, write; backward reads input and gradient, writes. Two residual additions: read
    # two, write one, with bias and dropout in the same kernel or one pass each. Backward adds the
    # two branches' gradients, and multiplies by the mask.
    norms = len(block.norms)
    forward: float = residual * (2 * norms + 2 * 3)
    backward: float = residual * (3 * norms + 2 * 3)
    if not fused:
        # Written out: square, mean, scale, weight; for narrow formats in fp32, with conversions.
        written = sum(norm.kind == "rmsnorm" for norm in block.norms.values())
        wide = size < 4
        forward += residual * written * ((16 if wide else 7) - 2)
        backward += residual * written * ((30 if wide else 14) - 3)
    if block.dropout > 0:
        forward += residual * 2 * (mask if fused else 2 + mask)
        backward += residual * 2 * (2 + mask)
    if not fused:
        biases = sum(mlp.bias for mlp, _ in block.mlp.passes)
        biases += isinstance(attention, AttentionSpec) and attention.output_bias
        forward += residual * biases * 2
    # The activation: read and write; backward reads input and gradient. Gated: two inputs.
    for mlp, times in block.mlp.passes:
        ffn = tokens * times * division.of(mlp.ffn_size).size(rank) * size
        if mlp.gated:
            gate = fused and layout.program.fused_gate
            forward += ffn * (3 if gate else 5)
            backward += ffn * (5 if gate else 12)
        else:
            forward += ffn * (2 if fused else 4)
            backward += ffn * 3
    # Q, K and V: to heads and back, and the rotation.
    query = attention.heads(division).query.size(rank) * attention.key_size
    moved = tokens * (query + key_value_numbers(attention, division, rank)) * size
    passes = 2 + ((2 if fused else 10) if attention.rotates else 0)
    forward += moved * passes
    backward += moved * passes
    if isinstance(block.mlp, ExpertsSpec):
        # Tokens are copied in the order of the experts and put back, weighted and added.
        sorted_rows = rows * block.mlp.active * block.hidden_size * size
        forward += 4 * sorted_rows
        backward += 5 * sorted_rows
    kernels = 8 if fused else 16
    overhead = kernels * device.kernel_seconds
    backward_seconds = stream_seconds(device, backward) + 1.5 * overhead
    backward_seconds += stream_seconds(device, _accumulation_bytes(block, layout, rank))
    return Pass(
        Seconds(elementwise=stream_seconds(device, forward) + overhead),
        Seconds(elementwise=backward_seconds),
    )


def _accumulation_bytes(block: BlockSpec, layout: Layout, rank: int) -> float:
    """Adding a microbatch's weight gradients to the accumulated ones.

    Accumulated ones are read and written; the new one is also read, unless the matmul adds it.
    With a single microbatch and gradients in the weights' format there is nothing to add.
    """
    wide = layout.gradient_bytes
    if layout.num_microbatches == 1 and wide == layout.itemsize:
        return 0.0
    if layout.lora_rank:
        return 0.0  # of adapters alone: nothing beside the rest
    weights = held(block, layout.division, rank).divided(layout.ep)
    return weights * (2 * wide + (0 if layout.program.fused_accumulation else layout.itemsize))


@lru_cache(maxsize=4096)
def ends_pass(model: ModelShape, layout: Layout, device: Device) -> tuple[Pass, Pass]:
    """The embedding, and the final norm, head and loss, for one microbatch on the fullest rank."""
    config, size = model.config, layout.itemsize
    tokens = layout.tokens
    vocab = layout.division.of(config.vocab_size).largest
    lookup = tokens * config.hidden_size * size
    embedding = Pass(
        Seconds(elementwise=stream_seconds(device, 4 * lookup)),
        Seconds(elementwise=stream_seconds(device, 4 * lookup)),
    )
    head = Linear("head", config.hidden_size, vocab)
    # The head is not multiplied in 8 bits, and is frozen where adapters alone are trained.
    wide = replace(layout, precision="bf16") if layout.precision == "fp8" else layout
    forward, dgrad, wgrad = _linear_seconds(wide, device, head)
    wgrad = 0.0 if layout.lora_rank else wgrad
    scale = 1.0 if size < 4 else 1.5  # an fp32 loss has no narrow copies, all passes are wide
    loss = stream_seconds(device, tokens * vocab * LOSS_BYTES * scale / 2)
    norm = stream_seconds(device, 2.5 * lookup)
    last = Pass(
        Seconds(matmul=forward, elementwise=loss + norm),
        Seconds(matmul=dgrad + wgrad, elementwise=loss + norm, weight_gradients=wgrad),
    )
    return embedding, last
