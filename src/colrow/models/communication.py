"""The collectives of a decoder's step, predicted from its configuration. Plain Python, no torch."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from colrow.comm.ledger import Call, Phase
from colrow.layers.describe import Division, Exchange, unknown
from colrow.models.config import ModelConfig
from colrow.models.stages import Stage
from colrow.partition import Partition

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# A hash of the batch and a number of the optimiser's steps, with their negatives: equal and
# opposite maxima mean that all ranks have the same.
INPUT_CHECK_ELEMENTS = 4
PHASES: tuple[Phase, Phase] = ("forward", "backward")
LOSS_STATISTICS = 3  # per token: the largest logit, the sum of exponentials, the label's logit


def predict_step(
    config: ModelConfig,
    division: Division,
    *,
    batch: int,
    sequence: int,
    sequence_parallel: bool = False,
    keep_gathered_input: bool = True,
    dtype: str = "float32",
) -> list[Call]:
    """Every collective of ``model.loss(...).backward()`` on one rank, in no particular order.

    Per block and direction two all-reduces, or with sequence parallelism two all-gathers and two
    reduce-scatters (Korthikanti et al. 2022, section 4.2.2); around them the embedding, the loss
    and one bucket for the gradients of parameters that several ranks hold.

    Args:
        config, division: the model and how it is divided.
        batch, sequence: shape of ``input_ids``; each is a count of one microbatch on one rank.
        keep_gathered_input: see :class:`colrow.Sharding`.
        dtype: element type of parameters and activations.
    """
    return predict_stage(
        config,
        division,
        Stage(0, 1, 0, config.num_layers),
        batch=batch,
        sequence=sequence,
        sequence_parallel=sequence_parallel,
        keep_gathered_input=keep_gathered_input,
        dtype=dtype,
    )


def predict_stage(
    config: ModelConfig,
    division: Division,
    stage: Stage,
    *,
    batch: int,
    sequence: int,
    sequence_parallel: bool = False,
    keep_gathered_input: bool = True,
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
    ranks = division.ranks
    if ranks == 1:
        return []
    width = compute_dtype or dtype
    row_bytes = config.hidden_size * ITEMSIZE[width]
    full = batch * sequence * row_bytes
    split = batch * Partition.even(sequence, ranks).largest * ranks * row_bytes
    statistics = "float64" if width == "float64" else "float32"
    calls: list[Call] = []

    def add(op: str, phase: Phase, layer: str) -> None:
        calls.append(_call(op, phase, layer, full if op == "all_reduce" else split, width))

    def column(layer: str, keep: bool = keep_gathered_input) -> None:
        if not sequence_parallel:
            add("all_reduce", "backward", layer)
            return
        add("all_gather", "forward", layer)
        if not keep:
            add("all_gather", "backward", layer)
        add("reduce_scatter", "backward", layer)

    def row(layer: str) -> None:
        if not sequence_parallel:
            add("all_reduce", "forward", layer)
            return
        add("reduce_scatter", "forward", layer)
        add("all_gather", "backward", layer)

    def exchange(sent: Exchange, layer: str) -> None:
        if sent.kind == "column":
            column(layer, keep_gathered_input or sent.keeps_input)
        elif sent.kind == "row":
            row(layer)
        elif sent.kind == "squares":
            size = sent.numbers * batch * sequence * ITEMSIZE[statistics]
            for phase in PHASES:
                calls.append(_call("all_reduce", phase, layer, size, statistics))
        else:
            unknown(sent, "the prediction of what is sent")

    if stage.is_first or stage.is_last:
        calls.append(_call("all_reduce", "forward", "inputs", 8 * INPUT_CHECK_ELEMENTS, "int64"))
    if stage.is_first and sequence_parallel:
        add("reduce_scatter", "forward", "embedding")
        add("all_gather", "backward", "embedding")
    elif stage.is_first:
        add("all_reduce", "forward", "embedding")
    for index in stage.blocks:
        for sent in config.blocks[index].exchanges():
            exchange(sent, f"blocks.{index}.{sent.layer}")
    if stage.is_last:
        column("head")
        size = ranks * LOSS_STATISTICS * batch * sequence * ITEMSIZE[statistics]
        calls.append(_call("all_gather", "forward", "loss", size, statistics))
    if shared != "later":
        found: Counter[str] = Counter()
        for name, elements in shared_elements(config, division, sequence_parallel).items():
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


def shared_elements(
    config: ModelConfig, division: Division, sequence_parallel: bool
) -> dict[str, int]:
    """Parameters whose gradient is summed over ranks, and their elements in the bucket."""
    if division.ranks == 1:
        return {}
    return {
        name: elements
        for name, parameter in config.parameters(division).items()
        if (elements := parameter.summed_elements(sequence_parallel=sequence_parallel))
    }


def _call(op: str, phase: Phase, layer: str, size: int, dtype: str) -> Call:
    return Call(op, phase, layer, size, dtype, "tp")
