"""What a run would be, without running it: ``colrow train --dry-run``. Starts no ranks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from colrow.comm.ledger import Call
from colrow.models.communication import predict_step
from colrow.models.config import Layout, ModelConfig, num_parameters, parameter_specs
from colrow.partition import parse_shares
from colrow.planner.hardware import find_hardware
from colrow.planner.layout import DTYPE as PLANNED
from colrow.planner.layout import Layout as PlannedLayout
from colrow.planner.memory import training_memory
from colrow.planner.model import ModelShape
from colrow.train.batches import Order
from colrow.train.data import training_and_held_out
from colrow.train.model import model_config, tokenizer_name
from colrow.train.settings import TrainSettings
from colrow.train.tokenize import BYTES

_STATE_BYTES = {"fp32": 4, "bf16": 4, "fp64": 8}  # of a parameter; its optimiser keeps two more
_ANY_GPU = "h100"  # what activations take does not depend on which
_COMPUTE_DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


@dataclass(frozen=True)
class RankShare:
    """What one tp rank holds; its dp replicas hold the same, or with FSDP2 a part of it.

    Attributes:
        query_heads, kv_heads, ffn_features, vocab_rows: of the whole model's.
        parameters: elements that it keeps between steps.
        parameter_bytes, gradient_bytes, optimizer_bytes: of those.
        activation_bytes: kept for backward and temporaries of one microbatch, as ``colrow plan``
            estimates them; None in fp64, which it does not know.
    """

    query_heads: int
    kv_heads: int
    ffn_features: int
    vocab_rows: int
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None


@dataclass(frozen=True)
class Preview:
    """The layout, the memory, what a step sends, the first batch.

    Attributes:
        parameters: of the whole model.
        sequences, held_out: of the data, to train on and to evaluate on.
        tokens_per_step: predicted per step, at most.
        epochs: how often the run sees its data.
        shares: by tp rank.
        calls: per step and rank over tp: operation to how many and their bytes.
        dp_bytes: of gradients (and with FSDP2 parameters) that a rank sends over dp per step.
        first_batch: the beginning of the first sequence, as text where the tokenizer is bytes.
    """

    parameters: int
    sequences: int
    held_out: int
    tokens_per_step: int
    epochs: float
    shares: tuple[RankShare, ...]
    calls: dict[str, tuple[int, int]]
    dp_bytes: int
    first_batch: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        lines = [
            f"model: {self.parameters:,} parameters",
            f"data: {self.sequences:,} sequences, {self.held_out:,} held out; "
            f"{self.tokens_per_step:,} tokens per step, {self.epochs:.2f} epochs",
        ]
        for rank, share in enumerate(self.shares):
            total = share.parameter_bytes + share.gradient_bytes + share.optimizer_bytes
            lines.append(
                f"tp rank {rank}: {share.query_heads} query heads, {share.kv_heads} KV heads, "
                f"{share.ffn_features} FFN features, {share.vocab_rows} vocabulary rows; "
                f"{_mb(total)} = {_mb(share.parameter_bytes)} parameters + "
                f"{_mb(share.gradient_bytes)} gradients + {_mb(share.optimizer_bytes)} optimiser"
                + (
                    f"; activations about {_mb(share.activation_bytes)}"
                    if share.activation_bytes
                    else ""
                )
            )
        for operation, (count, size) in self.calls.items():
            lines.append(f"each step, over tp: {count} x {operation}, {_mb(size)}")
        if self.dp_bytes:
            lines.append(f"each step, over dp: {_mb(self.dp_bytes)}")
        return "\n".join([*lines, f"the first sequence begins: {self.first_batch}"])


def preview(settings: TrainSettings) -> Preview:
    """Finds it from the settings, the model's configuration and the text, which is tokenised.

    Raises:
        ValueError: as training would, before its ranks start.
    """
    from colrow.train.loop import check

    check(settings)
    config = model_config(settings)
    layout = Layout.create(config, settings.tp, settings.tensor_split)
    training, held_out = training_and_held_out(settings)
    shares = tuple(
        _share(settings, config, layout, rank, activations)
        for rank, activations in enumerate(_activation_bytes(settings, config))
    )
    largest = max(share.parameter_bytes for share in shares)
    dp_bytes = 0
    if settings.dp > 1:
        # An all-reduce, or with FSDP2 two gathers of the parameters and a scatter per microbatch.
        passes = 3 * settings.microbatches * settings.dp if settings.fsdp else 2
        dp_bytes = round(passes * largest * (settings.dp - 1) / settings.dp)
    per_step = settings.global_batch * (settings.sequence - 1)
    return Preview(
        parameters=num_parameters(config),
        sequences=training.count,
        held_out=held_out.count,
        tokens_per_step=per_step,
        epochs=settings.steps * settings.global_batch / training.count,
        shares=shares,
        calls=_calls(settings, config, layout),
        dp_bytes=dp_bytes,
        first_batch=_beginning(settings, Order(training, settings.seed)),
    )


def _share(
    settings: TrainSettings,
    config: ModelConfig,
    layout: Layout,
    rank: int,
    activations: int | None,
) -> RankShare:
    elements = 0
    for spec in parameter_specs(config, layout).values():
        shape = spec.local_shape(rank)
        rows = -(-shape[0] // settings.dp) if settings.fsdp else shape[0]
        elements += math.prod((rows, *shape[1:]))
    size = elements * _STATE_BYTES[settings.precision]
    return RankShare(
        query_heads=layout.heads.query.size(rank),
        kv_heads=layout.heads.key_value.size(rank),
        ffn_features=layout.ffn.size(rank),
        vocab_rows=layout.vocab.size(rank),
        parameters=elements,
        parameter_bytes=size,
        gradient_bytes=size,
        optimizer_bytes=2 * size,
        activation_bytes=activations,
    )


def _activation_bytes(settings: TrainSettings, config: ModelConfig) -> list[int | None]:
    """By tp rank."""
    if settings.precision not in PLANNED:
        return [None] * settings.tp
    split = settings.tensor_split
    planned = PlannedLayout(
        tp=settings.tp,
        tp_weights=parse_shares(split, "tensor split") if split else (),
        dp=settings.dp,
        microbatch=settings.microbatch,
        global_batch=settings.global_batch,
        sequence=settings.sequence,
        sequence_parallel=settings.sequence_parallel,
        recompute=settings.recompute,  # type: ignore[arg-type]
        zero=3 if settings.fsdp else 0,
        precision=settings.precision,
    )
    memory = training_memory(ModelShape("", config), planned, find_hardware(_ANY_GPU))
    return [round(rank.activations + rank.transient) for rank in memory.ranks[0]]


def _calls(
    settings: TrainSettings, config: ModelConfig, layout: Layout
) -> dict[str, tuple[int, int]]:
    calls: list[Call] = predict_step(
        config,
        layout,
        batch=settings.microbatch,
        sequence=settings.sequence,
        sequence_parallel=settings.sequence_parallel,
        dtype=_COMPUTE_DTYPE[settings.precision],
    )
    if settings.recompute == "full":  # blocks run forward again
        again = [call for call in calls if call.layer.startswith("blocks.")]
        calls = calls + [call for call in again if call.phase == "forward"]
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for call in calls:
        counts[call.op] += settings.microbatches
        sizes[call.op] += settings.microbatches * call.bytes
    return {operation: (counts[operation], sizes[operation]) for operation in sorted(counts)}


def _beginning(settings: TrainSettings, order: Order) -> str:
    ids: list[int] = order.batch(0, 1)[0][0, :48].tolist()
    if tokenizer_name(settings) == BYTES:
        return repr(bytes(i for i in ids if i < 256).decode(errors="replace"))
    from colrow.generate.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_name(settings))
    return repr(
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
