"""What a pipelined step sends on one rank, predicted from the configuration. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from colrow.comm.ledger import Call
from colrow.layers.describe import Division
from colrow.models.communication import ITEMSIZE, predict_stage, shared_elements
from colrow.models.config import ModelConfig
from colrow.models.stages import LayerSplit
from colrow.partition import Partition
from colrow.pipeline.limits import ZERO_BUBBLE
from colrow.pipeline.schedules import Schedule

BUCKET_BYTES = 25 << 20


def predict_pipeline_step(
    config: ModelConfig,
    division: Division,
    split: LayerSplit,
    schedule: Schedule,
    *,
    tp_rank: int,
    pp_rank: int,
    microbatches: int,
    batch: int,
    sequence: int,
    dp: int = 1,
    dp_rank: int = 0,
    fsdp: bool = False,
    sequence_parallel: bool = False,
    keep_gathered_input: bool = True,
    dtype: str = "float32",
    compute_dtype: str | None = None,
) -> list[Call]:
    """Every collective and message of :meth:`PipelineRunner.backward`, in no particular order.

    Each stage's collectives for each microbatch, as in one process; a message at each cut between
    two ranks, there and back, of the hidden states that the rank works on; and behind the schedule
    the gradients of a tied embedding, of replicas, and for zero-bubble schedules of parameters that
    several tp ranks hold. Which of GPipe, 1F1B or interleaved changes the order alone.

    Args:
        tp_rank, pp_rank: which rank.
        microbatches, batch: of a dp rank in a step, and sequences in one.
        dp, dp_rank, fsdp: data parallelism; what FSDP2 sends over dp is not in the list.
        dtype: of parameters and gradients.
        compute_dtype: of activations, where it is another.
    """
    ranks, calls = division.ranks, []
    width = compute_dtype or dtype
    later = schedule in ZERO_BUBBLE
    apart = (fsdp and dp > 1) or compute_dtype is not None
    length = sequence
    if sequence_parallel and ranks > 1:
        length = Partition.even(sequence, ranks).size(tp_rank)
    message = batch * length * config.hidden_size * ITEMSIZE[width]

    def crossing(block: int, other: int, forward: str) -> None:
        if other != pp_rank:
            backward = "recv" if forward == "send" else "send"
            calls.append(Call(forward, "forward", f"blocks.{block}", message, width, "pp"))
            calls.append(Call(backward, "backward", f"blocks.{block}", message, width, "pp"))

    for stage in split.of_rank(pp_rank):
        calls += predict_stage(
            config,
            division,
            stage,
            batch=batch,
            sequence=sequence,
            sequence_parallel=sequence_parallel,
            keep_gathered_input=keep_gathered_input,
            dtype=dtype,
            compute_dtype=compute_dtype,
            shared="later" if later else "blocks" if apart else "stage",
        )
        if not stage.is_first:
            crossing(stage.start, split.rank_of(stage.index - 1), "recv")
        if not stage.is_last:
            crossing(stage.stop, split.rank_of(stage.index + 1), "send")
    calls *= microbatches
    itemsize = ITEMSIZE[dtype]
    held = split.held(config.parameters(division), pp_rank, tied=config.tie_embeddings)
    if later and ranks > 1:
        shared = shared_elements(config, division, sequence_parallel)
        elements = sum(count for name, count in shared.items() if name in held)
        if elements:
            calls.append(Call("all_reduce", "backward", "shared", elements * itemsize, dtype, "tp"))
    sharded = fsdp and dp > 1
    ends = (0, split.last_rank)
    if config.tie_embeddings and split.last_rank and pp_rank in ends:
        shape = held["embedding.weight"].shard.local_shape(tp_rank)
        rows = shape[0]
        if sharded:  # as torch.chunk divides
            chunk = -(-rows // dp)
            rows = min(rows, (dp_rank + 1) * chunk) - min(rows, dp_rank * chunk)
        size = rows * math.prod(shape[1:]) * itemsize
        calls.append(Call("all_reduce", "backward", "embedding", size, dtype, "pp"))
    if dp > 1 and not fsdp:
        sizes = [math.prod(spec.shard.local_shape(tp_rank)) * itemsize for spec in held.values()]
        for members in buckets(sizes, BUCKET_BYTES):
            size = sum(sizes[i] for i in members)
            calls.append(Call("all_reduce", "backward", "gradients", size, dtype, "dp"))
    return calls


def buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive items together, as many as stay below ``limit``; a larger one is alone."""
    found: list[list[int]] = []
    filled = 0
    for index, size in enumerate(sizes):
        if not found or filled + size > limit:
            found.append([])
            filled = 0
        found[-1].append(index)
        filled += size
    return found
