"""The time of attention itself: scores, softmax, weighted sum, of all local heads."""

from __future__ import annotations

from colrow.layers.describe import BlockSpec
from colrow.planner.hardware import Device
from colrow.planner.layout import Layout
from colrow.planner.passes import Pass, Seconds
from colrow.planner.roofline import ROW_BYTES, matmul_seconds, stream_seconds


def attention_pass(block: BlockSpec, layout: Layout, device: Device, rank: int) -> Pass:
    """Forward and backward of one block's attention for one microbatch."""
    attention, size = block.attention, layout.itemsize
    keys = min(attention.window or layout.sequence, layout.sequence)
    count = layout.microbatch * attention.heads(layout.division).query.size(rank)
    precision = "bf16" if layout.precision == "fp8" else layout.precision
    if layout.is_flash(attention, device.flash_attention):
        # Causal: half the scores (Dao 2023, section 4.1); backward has five matmuls for two.
        sizes = attention.key_size + attention.value_size
        flops = 2.0 * count * layout.local_sequence * keys * sizes * 0.5
        rate = device.flops(precision) * device.sustained_fraction
        if device.matmul_curve:
            rate = device.matmul_curve[-1][1]
        shares = (device.flash_forward, device.flash_backward)
        if layout.program.flash2:
            shares = (device.flash2_forward, device.flash2_backward)
        return Pass(
            Seconds(attention=flops / (rate * shares[0]) + device.kernel_seconds),
            Seconds(attention=2.5 * flops / (rate * shares[1]) + device.kernel_seconds),
        )

    def product(n: int, k: int) -> float:
        return matmul_seconds(
            device,
            layout.local_sequence,
            n,
            k,
            precision=precision,
            itemsize=size,
            count=count,
            aligned=attention.key_size * size % ROW_BYTES == 0,
        )

    products = product(keys, attention.key_size) + product(attention.value_size, keys)
    scores = count * layout.local_sequence * keys
    # Softmax reads and writes; dropout reads, writes and stores a byte of mask. Backward of
    # dropout reads the gradient and the mask and writes; of softmax reads two tensors, writes one.
    dropout = attention.dropout > 0
    softmax_forward = 2 * size + (2 * size + 1 if dropout else 0)
    softmax_backward = 3 * size + (2 * size + 1 if dropout else 0)
    if not layout.program.fused_elementwise:  # scale and mask as passes of their own
        softmax_forward += 4 * size
        softmax_backward += 2 * size
    return Pass(
        Seconds(attention=products + stream_seconds(device, scores * softmax_forward)),
        Seconds(attention=2 * products + stream_seconds(device, scores * softmax_backward)),
    )
