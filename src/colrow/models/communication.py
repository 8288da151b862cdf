"""The collectives of a decoder's step, predicted from its configuration. Plain Python, no torch."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from colrow.comm.ledger import Call, Phase
from colrow.layers.chunks import chunk_count, chunk_partition, row_chunks, sequence_chunks
from colrow.models.config import Layout, ModelConfig, parameter_specs
from colrow.models.stages import Stage
from colrow.partition import Partition, ShardSpec

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# A hash of the batch and a number of the optimiser's steps, with their negatives: equal and
# opposite maxima mean that all ranks have the same.
INPUT_CHECK_ELEMENTS = 4
LOSS_STATISTICS = 3  # per token: the largest logit, the sum of exponentials, the label's logit


def predict_step(
    config: ModelConfig,
    layout: Layout,
    *,
    batch: int,
    sequence: int,
    sequence_parallel: bool = False,
    keep_gathered_input: bool = True,
    chunk_bytes: int | None = None,
    dtype: str = "float32",
) -> list[Call]:
    """Every collective of ``model.loss(...).backward()`` on one rank, in no particular order.

    Per block and direction two all-reduces, or with sequence parallelism two all-gathers and two
    reduce-scatters (Korthikanti et al. 2022, section 4.2.2); around them the embedding, the loss
    and one bucket for the gradients of parameters that several ranks hold.

    Args:
        config, layout: the model and how it is divided.
        batch, sequence: shape of ``input_ids``; each is a count of one microbatch on one rank.
        keep_gathered_input, chunk_bytes: see :class:`colrow.layers.FusedColumnParallelLinear`; a
            message in chunks is as many calls.
        dtype: element type of parameters and activations.
    """
    return predict_stage(
        config,
        layout,
        Stage(0, 1, 0, config.num_layers),
        batch=batch,
        sequence=sequence,
        sequence_parallel=sequence_parallel,
        keep_gathered_input=keep_gathered_input,
        chunk_bytes=chunk_bytes,
        dtype=dtype,
    )


def predict_stage(
    config: ModelConfig,
    layout: Layout,
    stage: Stage,
    *,
    batch: int,
    sequence: int,
    sequence_parallel: bool = False,
    keep_gathered_input: bool = True,
    chunk_bytes: int | None = None,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    shared: Literal["stage", "blocks", "later"] = "stage",
) -> list[Call]:
    """The collectives over tp of one stage and microbatch; arguments as for :func:`predict_step`.

    Args:
        compute_dtype: of activations, where it is not that of the parameters.
        shared: gradients of parameters that several ranks hold are summed in one bucket of the
            stage, in one of each block and one of the rest, or later.
    """
    ranks = layout.vocab.parts
    if ranks == 1:
        return []
    width = compute_dtype or dtype
    row_bytes = config.hidden_size * ITEMSIZE[width]
    full = batch * sequence * row_bytes
    divided = Partition.even(sequence, ranks)
    split = batch * divided.largest * ranks * row_bytes
    rows = row_chunks(batch * sequence, chunk_count(full, batch * sequence, chunk_bytes))
    positions = sequence_chunks(divided, chunk_count(split, min(divided.sizes), chunk_bytes))
    in_rows = [(stop - start) * row_bytes for start, stop in rows]
    in_positions = [
        batch * chunk_partition(ranges).largest * ranks * row_bytes for ranges in positions
    ]
    calls: list[Call] = []

    def add(op: str, phase: Phase, layer: str) -> None:
        calls.append(_call(op, phase, layer, full if op == "all_reduce" else split, width))

    def add_chunks(op: str, phase: Phase, layer: str) -> None:
        sizes = in_rows if op == "all_reduce" else in_positions
        calls.extend(_call(op, phase, layer, size, width) for size in sizes)

    def column(layer: str) -> None:
        if not sequence_parallel:
            add("all_reduce", "backward", layer)
            return
        add_chunks("all_gather", "forward", layer)
        if not keep_gathered_input:
            add("all_gather", "backward", layer)
        add("reduce_scatter", "backward", layer)

    def row(layer: str) -> None:
        if not sequence_parallel:
            add_chunks("all_reduce", "forward", layer)
            return
        add_chunks("reduce_scatter", "forward", layer)
        add_chunks("all_gather", "backward", layer)

    if stage.is_first or stage.is_last:
        calls.append(_call("all_reduce", "forward", "inputs", 8 * INPUT_CHECK_ELEMENTS, "int64"))
    if stage.is_first and sequence_parallel:
        add("reduce_scatter", "forward", "embedding")
        add("all_gather", "backward", "embedding")
    elif stage.is_first:
        add("all_reduce", "forward", "embedding")
    for index in stage.blocks:
        column(f"blocks.{index}.attention.qkv")
        row(f"blocks.{index}.attention.output")
        column(f"blocks.{index}.mlp.up")
        row(f"blocks.{index}.mlp.down")
    if stage.is_last:
        column("head")
        loss_dtype = "float64" if width == "float64" else "float32"
        size = ranks * LOSS_STATISTICS * batch * sequence * ITEMSIZE[loss_dtype]
        calls.append(_call("all_gather", "forward", "loss", size, loss_dtype))
    if shared != "later":
        found: Counter[str] = Counter()
        for name, elements in shared_elements(config, layout, sequence_parallel).items():
            if stage.holds(name, tied=False):
                block = shared == "blocks" and name.startswith("blocks.")
                number = name.split(".")[1]
                found[f"blocks.{number}.attention.qkv" if block else "shared"] += elements
        for layer, elements in found.items():
            narrow = width if layer != "shared" or shared == "blocks" else dtype
            calls.append(
                _call("all_reduce", "backward", layer, elements * ITEMSIZE[narrow], narrow)
            )
    return calls


def shared_elements(config: ModelConfig, layout: Layout, sequence_parallel: bool) -> dict[str, int]:
    """Parameters whose gradient is summed over ranks, and their elements in the bucket.

    Row biases and norms under sequence parallelism; query and key norms always, because each rank
    applies them to its own heads; and KV heads that several ranks hold.
    """
    if layout.vocab.parts == 1:
        return {}
    found: dict[str, int] = {}
    for name, spec in parameter_specs(config, layout).items():
        whole = spec.dim is None
        per_head = name.endswith(("query_norm.weight", "key_norm.weight"))
        if whole and (sequence_parallel or per_head):
            found[name] = _elements(spec, spec.shape[0])
        elif not whole:
            rows = sum(last - first for block in spec.blocks for first, last in block.shared)
            if rows and spec.dim == 0:
                found[name] = _elements(spec, rows)
    return found


def _elements(spec: ShardSpec, rows: int) -> int:
    total = rows
    for length in spec.shape[1:]:
        total *= length
    return total


def _call(op: str, phase: Phase, layer: str, size: int, dtype: str) -> Call:
    return Call(op, phase, layer, size, dtype, "tp")
