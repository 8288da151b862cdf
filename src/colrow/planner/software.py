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


@dataclass(frozen=True)
class Software:
    """What a training program does, as far as memory and time depend on it.

    Attributes:
        name: as shown.
        flash_attention: attention in one kernel that never stores the scores (Dao 2023, arXiv
            2307.08691). Without it the scores are written, masked, normalised and dropped out.
        fused_elementwise: bias, dropout, residual and activation as one kernel each (Narayanan et
            al. 2021, section 4.2); without, a kernel and a pass over memory each.
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
        p2p_overlap: activations travel between stages while other microbatches compute.
        keep_gathered_input: with sequence parallelism, gathered inputs are kept for backward.
        scatter_gather: a tensor that all ranks of a tensor-parallel group hold is sent between
            stages once, each rank a part (Narayanan et al. 2021, section 4.1).
        gradient_bytes: of an accumulated gradient in 16-bit training.
        source: where this is documented.
    """

    name: str
    flash_attention: bool = True
    fused_elementwise: bool = True
    flash_dropout: bool = True
    written_dropout: bool = False
    fused_accumulation: bool = False
    tp_overlap: TPOverlap = "backward"
    dp_overlap: bool = True
    p2p_overlap: bool = False
    keep_gathered_input: bool = True
    scatter_gather: bool = True
    gradient_bytes: int = 4
    source: str = ""


SOFTWARE = {
    software.name: software
    for software in (
        Software(
            "colrow",
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
            source="Rajbhandari et al. 2019, arXiv 1910.02054; ZeRO-3 as compared in Narayanan et "
            "al. 2021, section 5.2",
        ),
        Software(
            "megatron-core",
            fused_accumulation=True,
            tp_overlap="full",
            p2p_overlap=True,
            keep_gathered_input=False,
            source="Megatron-LM f2e5db402c README: tp-comm-overlap, overlap-grad-reduce, "
            "overlap-param-gather",
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
