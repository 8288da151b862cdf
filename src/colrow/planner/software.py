"""Which program runs the layout: what it fuses, overlaps and stores. No fitted numbers.

The same model on the same V100 took 1.29 s a step in May 2020 and 1.12 s in September, as
Megatron-LM gained fused kernels, so a published time can only be compared to a prediction for the
program that produced it. Each preset says what its publication says.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

TPOverlap = Literal["none", "backward", "full"]
StageRule = Literal["even", "balanced", "filled"]

# Fitted to the 64 rows with microbatch 1 and tp 1 of vTrain's single-node table (Megatron-DeepSpeed
# on 2 to 8 A100, hidden 1024, full recomputation: three passes through each layer), where a layer
# and microbatch takes 3.34 ms and a microbatch 3.4 ms beside, whatever the sizes: mean error 3.0 %,
# largest 9.4 %. Other programs in eager Python are taken to be alike.
HOST_LAYER_SECONDS = 3.34e-3 / 3
HOST_ENDS_SECONDS = 3.4e-3
# The same in nanotron with tensor parallelism, forward and backward: fitted to the three rows of
# one node of 8 H100 with microbatch 1, tp 4 and 8 and one stage (ultrascale playbook), where 28
# layers take 0.121, 0.124 and 0.125 s a microbatch, whatever the tensor-parallel size.
NANOTRON_LAYER_SECONDS = 2.14e-3
# Where its stages are on several nodes of that cluster, launching gets slower by this much per
# tensor-parallel rank and pass: the median (quartiles 1.05 and 1.14 ms) of the 27 rows of 16 and 32
# H100 with more than one stage, tp 2, 4 and 8, and microbatches of 1 and 2; 6 further such rows, in
# which a microbatch took a second whatever it computed, do not count. The cause is not known; one
# slow rank holds up the others of its group.
NANOTRON_STALL_SECONDS = 1.09e-3
# ZeRO-3 of 2021 gathers block by block over one ring: calibrated on the 174.6B rows of Narayanan et
# al. 2021, Table 2, where one and two sequences per GPU take equally long: 67 s for three times
# 349 GB of weights. FSDP2 on 64 A100 (torchtitan) shows no such limit.
ZERO3_ADAPTER_SHARE = 0.68


@dataclass(frozen=True)
class Software:
    """What a training program does, as far as memory and time depend on it.

    Attributes:
        name: as shown.
        flash_attention: attention in one kernel that never stores the scores (Dao 2023, arXiv
            2307.08691). Without it the scores are written, masked, normalised and dropped out.
        fused_elementwise: bias, dropout, residual and activation as one kernel each (Narayanan et
            al. 2021, section 4.2); without, a kernel and a pass over memory each.
        fused_gate: a gated activation and its product are one kernel too.
        flash2: that kernel is FlashAttention-2 where the device has faster ones (cuDNN,
            FlashAttention-3).
        flash_dropout: that kernel also drops attention weights; where it does not, training with
            attention dropout runs without it.
        written_dropout: dropout is written out in tensor operations. Its masks are drawn as 64-bit
            integers, and attention that drops weights copies queries, keys and values and keeps
            its softmax in fp32.
        fused_accumulation: weight gradients are added to the accumulated ones inside the matmul.
        tp_overlap: which tensor-parallel collectives run beside a matmul: none; those of backward,
            beside the weight gradient (Korthikanti et al. 2022, section 4.2.2); or all, chunk by
            chunk beside the matmul that produces or consumes the data (Transformer Engine).
        dp_overlap: gradients are reduced while backward runs.
        zero_overlap: where ZeRO divides the optimiser, scattering gradients and gathering
            parameters run beside computing too.
        p2p_overlap: activations travel between stages while other microbatches compute.
        stage_rule: how many layers each pipeline stage has: as even as possible, the remainder in
            the middle; balanced, so that the slowest stage is as fast as can be, with the head on
            the last; or filled from the first on until its share of the cost is exceeded.
        fused_narrowing: 8-bit matrices are written by the kernel that makes the wide ones, and
            weights narrowed once a step.
        dispatch_once: a token travels once to each rank that has experts of its, and not once for
            each expert.
        narrow_gathers: with 8-bit matmuls, tensor-parallel gathers send 8 bits.
        keep_gathered_input: with sequence parallelism, gathered inputs are kept for backward.
        scatter_gather: a tensor that all ranks of a tensor-parallel group hold is sent between
            stages once, each rank a part (Narayanan et al. 2021, section 4.1).
        gradient_bytes: of an accumulated gradient in 16-bit training.
        bucketed_gradients: replicas keep 16-bit gradients in buckets beside accumulated ones.
        zero3_adapter_share: ZeRO-3 between nodes runs over one adapter per device, at this share of
            its bandwidth, instead of over all adapters of a node.
        host_layer_seconds: what the host needs to launch one pass through a layer: forward, forward
            again, or backward. A device that computes faster waits for it.
        host_ends_seconds: the same for embedding, head, loss and the loop, once a microbatch.
        host_stall_seconds: by how much launching a pass through a layer gets slower per
            tensor-parallel rank, on a shared network over which stages exchange.
        source: where this is documented.
    """

    name: str
    flash_attention: bool = True
    flash2: bool = False
    fused_elementwise: bool = True
    fused_gate: bool = True
    flash_dropout: bool = True
    written_dropout: bool = False
    fused_accumulation: bool = False
    tp_overlap: TPOverlap = "backward"
    dp_overlap: bool = True
    zero_overlap: bool = True
    p2p_overlap: bool = False
    stage_rule: StageRule = "even"
    fused_narrowing: bool = False
    dispatch_once: bool = False
    narrow_gathers: bool = False
    keep_gathered_input: bool = True
    scatter_gather: bool = True
    gradient_bytes: int = 4
    bucketed_gradients: bool = False
    zero3_adapter_share: float | None = None
    host_layer_seconds: float = HOST_LAYER_SECONDS
    host_ends_seconds: float = HOST_ENDS_SECONDS
    host_stall_seconds: float = 0.0
    source: str = ""


SOFTWARE = {
    software.name: software
    for software in (
        Software(
            "colrow",
            stage_rule="balanced",
            flash2=True,
            fused_elementwise=False,
            flash_dropout=False,
            written_dropout=True,
            source="this project, in eager execution",
        ),
        Software(
            "megatron-2019",
            flash_attention=False,
            fused_elementwise=False,
            tp_overlap="none",
            gradient_bytes=2,
            source="Shoeybi et al. 2019, arXiv 1909.08053; no fused kernels yet",
        ),
        Software(
            "megatron-2020",
            flash_attention=False,
            tp_overlap="none",
            gradient_bytes=2,
            source="Megatron-LM 5281919420 (September 2020): JIT-fused bias, GELU and dropout",
        ),
        Software(
            "megatron-2021",
            flash_attention=False,
            tp_overlap="none",
            dp_overlap=False,
            source="Narayanan et al. 2021, arXiv 2104.04473, section 4",
        ),
        Software(
            "megatron-2022",
            flash_attention=False,
            fused_accumulation=True,
            dp_overlap=False,
            keep_gathered_input=False,
            source="Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2",
        ),
        Software(
            "deepspeed-2021",
            flash_attention=False,
            tp_overlap="none",
            gradient_bytes=2,
            zero3_adapter_share=ZERO3_ADAPTER_SHARE,
            source="Rajbhandari et al. 2019, arXiv 1910.02054; ZeRO-3 as compared in Narayanan et "
            "al. 2021, section 5.2",
        ),
        Software(
            "megatron-core",
            dispatch_once=True,
            fused_narrowing=True,
            narrow_gathers=True,
            fused_accumulation=True,
            tp_overlap="full",
            p2p_overlap=True,
            keep_gathered_input=False,
            source="Megatron-LM f2e5db402c README: tp-comm-overlap, overlap-grad-reduce, "
            "overlap-param-gather; experts by HybridEP, as Megatron Bridge's recipes have it",
        ),
        Software(
            "megatron-core-default",
            fused_narrowing=True,
            narrow_gathers=True,
            fused_accumulation=True,
            keep_gathered_input=False,
            source="Megatron-LM f2e5db402c, megatron/training/arguments.py: --tp-comm-overlap, "
            "which needs Transformer Engine's user buffers, is off unless asked for",
        ),
        Software(
            "megatron-deepspeed",
            flash_attention=False,
            tp_overlap="none",
            dp_overlap=False,
            source="Megatron-DeepSpeed of 2021 and 2022 (BLOOM; vTrain): Megatron-LM's layers of "
            "2021 under DeepSpeed's engine, whose ZeRO-1 reduces gradients after the last backward",
        ),
        Software(
            "torchtitan",
            narrow_gathers=True,
            flash2=True,
            fused_accumulation=False,
            tp_overlap="none",
            keep_gathered_input=False,
            host_layer_seconds=HOST_LAYER_SECONDS / 2,
            source="pytorch/torchtitan b5bcd76c6: FSDP2, SDPA, blocks under torch.compile, of "
            "which half as many launches are assumed; fp32 gradients",
        ),
        Software(
            "torchtitan-async-tp",
            narrow_gathers=True,
            flash2=True,
            tp_overlap="full",
            keep_gathered_input=False,
            host_layer_seconds=HOST_LAYER_SECONDS / 2,
            source="the same with --experimental.enable_async_tensor_parallel",
        ),
        Software(
            "nanotron",
            flash2=True,
            fused_gate=False,
            bucketed_gradients=True,
            zero_overlap=False,
            stage_rule="filled",
            tp_overlap="none",
            host_layer_seconds=NANOTRON_LAYER_SECONDS,
            host_stall_seconds=NANOTRON_STALL_SECONDS,
            source="huggingface/nanotron: flash attention 2, fused norms and rotary embeddings, "
            "stages of equal cost, fp32 gradient accumulation beside PyTorch's DDP, whose buckets "
            "hold the 16-bit gradients, ZeRO-1 after the last backward; gathered inputs kept, as "
            "the playbook's memory shows",
        ),
    )
}


def find_software(name: str) -> Software:
    """A preset by name.

    Raises:
        ValueError: when there is none of that name.
    """
    if name in SOFTWARE:
        return SOFTWARE[name]
    near = difflib.get_close_matches(name, SOFTWARE, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(SOFTWARE)}"
    raise ValueError(f"unknown software {name!r}: {hint}")
