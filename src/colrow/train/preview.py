"""What a run would be, without running it: ``colrow train --dry-run``. Starts no ranks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from colrow.checkpoint.pretrained import pretrained_config
from colrow.comm.ledger import Call
from colrow.layers.describe import Division
from colrow.models.config import ModelConfig, num_parameters
from colrow.models.stages import LayerSplit
from colrow.partition import parse_shares
from colrow.pipeline.limits import ZERO_BUBBLE, schedule_named
from colrow.pipeline.messages import predict_pipeline_step
from colrow.pipeline.rank_map import rank_map
from colrow.planner.hardware import find_hardware
from colrow.planner.layout import DTYPE as PLANNED
from colrow.planner.layout import Layout as PlannedLayout
from colrow.planner.memory import training_memory
from colrow.planner.model import ModelShape
from colrow.train.batches import Order
from colrow.train.data import training_and_held_out
from colrow.train.settings import TrainSettings
from colrow.train.starting_model import check_settings, describe, pipeline_split, tokenizer_name
from colrow.train.tokenize import BYTES

_STATE_BYTES = {"fp32": 4, "bf16": 4, "fp16": 4, "fp64": 8}  # of parameters and optimiser
_ANY_GPU = "h100"  # what activations take does not depend on which
_COMPUTE_DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


@dataclass(frozen=True)
class RankShare:
    """What a tp rank of a pipeline rank holds; its dp replicas the same, or with FSDP2 a part.

    Attributes:
        pp_rank, tp_rank, layers: which rank, and its numbers of layers.
        query_heads, kv_heads, ffn_features, vocab_rows: of the whole model's.
        parameters: elements that it keeps between steps.
        parameter_bytes, gradient_bytes, optimizer_bytes: of those.
        activation_bytes: kept for backward and temporaries of one microbatch, as ``colrow plan``
            estimates them; None in fp64, which it does not know.
    """

    pp_rank: int
    tp_rank: int
    layers: tuple[int, ...]
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
        ranks: which rank does what, for a person.
        shares: by pp rank, then by tp rank.
        calls: per step and rank over tp: operation to how many and their bytes; in a pipeline on
            its first rank.
        messages: the same of its messages to and from other stages.
        dp_bytes: of gradients (and with FSDP2 parameters) that a rank sends over dp per step.
        first_batch: the beginning of the first sequence, as text where the tokenizer is bytes.
    """

    parameters: int
    sequences: int
    held_out: int
    tokens_per_step: int
    epochs: float
    ranks: str
    shares: tuple[RankShare, ...]
    calls: dict[str, tuple[int, int]]
    messages: dict[str, tuple[int, int]]
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
            self.ranks,
        ]
        several = self.shares[-1].pp_rank > 0
        for share in self.shares:
            total = share.parameter_bytes + share.gradient_bytes + share.optimizer_bytes
            lines.append(
                f"{f'pp rank {share.pp_rank}, ' if several else ''}tp rank {share.tp_rank}: "
                f"{share.query_heads} query heads, {share.kv_heads} KV heads, "
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
        for operation, (count, size) in self.messages.items():
            lines.append(f"each step, over pp: {count} x {operation}, {_mb(size)}")
        if self.dp_bytes:
            lines.append(f"each step, over dp: {_mb(self.dp_bytes)}")
        return "\n".join([*lines, f"the first sequence begins: {self.first_batch}"])


def preview(settings: TrainSettings) -> Preview:
    """Finds it from the settings, the model's configuration and the text, which is tokenised.

    Raises:
        ValueError: as training would, before its ranks start.
    """
    check_settings(settings)
    if (model := describe(settings)).kind == "in place":
        raise ValueError(
            f"--dry-run foretells runs of the described families, and this {model.name} is split "
            "in place: colrow parallelize --explain shows how"
        )
    config = pretrained_config(settings.model)
    division = config.divide(settings.tp, settings.tensor_split)
    training, held_out = training_and_held_out(settings)
    split = pipeline_split(settings, config)
    shares = tuple(
        _share(settings, config, division, split, pp_rank, rank, activations)
        for pp_rank, stage in enumerate(_activation_bytes(settings, config, split))
        for rank, activations in enumerate(stage)
    )
    calls = _calls(settings, config, division, split)
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
        ranks=rank_map(settings.tp, settings.dp, split),
        shares=shares,
        calls=_counts([call for call in calls if call.group == "tp"]),
        messages=_counts([call for call in calls if call.group == "pp"]),
        dp_bytes=dp_bytes,
        first_batch=_beginning(settings, Order(training, settings.seed)),
    )


def _share(
    settings: TrainSettings,
    config: ModelConfig,
    division: Division,
    split: LayerSplit,
    pp_rank: int,
    rank: int,
    activations: int | None,
) -> RankShare:
    elements = state = 0
    specs = config.parameters(division)
    for name, parameter in split.held(specs, pp_rank, tied=config.tie_embeddings).items():
        spec = parameter.shard
        shape = spec.local_shape(rank)
        rows = -(-shape[0] // settings.dp) if settings.fsdp else shape[0]
        held = math.prod((rows, *shape[1:]))
        elements += held
        state += _state_elements(settings.optimizer, name, held, spec.shape)
    size = elements * _STATE_BYTES[settings.precision]
    first = config.blocks[0]
    heads = first.attention.heads(division)
    return RankShare(
        pp_rank=pp_rank,
        tp_rank=rank,
        layers=tuple(split.layers_of_rank(pp_rank)),
        query_heads=heads.query.size(rank),
        kv_heads=heads.key_value.size(rank),
        ffn_features=division.of(first.mlp.ffn_size).size(rank),
        vocab_rows=division.of(config.vocab_size).size(rank),
        parameters=elements,
        parameter_bytes=size,
        gradient_bytes=size,
        optimizer_bytes=state * _STATE_BYTES[settings.precision],
        activation_bytes=activations,
    )


def _state_elements(optimizer: str, name: str, held: int, shape: tuple[int, ...]) -> int:
    """What an optimiser keeps for a parameter of which a rank holds so many elements."""
    matrix = len(shape) > 1
    if optimizer == "adafactor" and matrix:  # the whole factors; a fused matrix's are a few more
        return sum(shape)
    if optimizer in ("sgd", "adafactor") or (
        optimizer == "muon" and matrix and name.startswith("blocks.")
    ):
        return held
    return 2 * held


def _activation_bytes(
    settings: TrainSettings, config: ModelConfig, split: LayerSplit
) -> list[list[int | None]]:
    """By pp rank, then by tp rank."""
    if settings.precision not in PLANNED or (settings.pp > 1 and settings.schedule in ZERO_BUBBLE):
        return [[None] * settings.tp for _ in range(settings.pp)]
    several = settings.pp > 1 and settings.schedule == "interleaved"
    shares = settings.tensor_split
    planned = PlannedLayout(
        tp=settings.tp,
        tp_weights=parse_shares(shares, "tensor split") if shares else (),
        pp=settings.pp,
        dp=settings.dp,
        schedule=settings.schedule if settings.pp > 1 else "1f1b",  # type: ignore[arg-type]
        virtual_stages=split.stages_per_rank if several else 1,
        stage_layers=tuple(len(split.layers_of_rank(rank)) for rank in range(settings.pp)),
        microbatch=settings.microbatch,
        global_batch=settings.global_batch,
        sequence=settings.sequence,
        sequence_parallel=settings.sequence_parallel,
        recompute=settings.recompute,  # type: ignore[arg-type]
        zero=3 if settings.fsdp else 0,
        precision=settings.precision,
    )
    memory = training_memory(ModelShape("", config), planned, find_hardware(_ANY_GPU))
    return [[round(rank.activations + rank.transient) for rank in at] for at in memory.ranks]


def _calls(
    settings: TrainSettings, config: ModelConfig, division: Division, split: LayerSplit
) -> list[Call]:
    """Of a step, on the first rank."""
    width = _COMPUTE_DTYPE[settings.precision]
    stored = _COMPUTE_DTYPE["fp64" if settings.precision == "fp64" else "fp32"]
    calls = predict_pipeline_step(
        config,
        division,
        split,
        schedule_named(settings.schedule) if settings.pp > 1 else "1f1b",
        tp_rank=0,
        pp_rank=0,
        microbatches=settings.microbatches,
        batch=settings.microbatch,
        sequence=settings.sequence,
        dp=settings.dp,
        fsdp=settings.fsdp,
        sequence_parallel=settings.sequence_parallel,
        dtype=stored,
        compute_dtype=width if width != stored else None,
    )
    if settings.recompute == "full":  # blocks run forward again
        inside = [call for call in calls if call.layer.startswith("blocks.")]
        calls += [call for call in inside if call.phase == "forward" and call.group == "tp"]
    return calls


def _counts(calls: list[Call]) -> dict[str, tuple[int, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for call in calls:
        counts[call.op] += 1
        sizes[call.op] += call.bytes
    return {operation: (counts[operation], sizes[operation]) for operation in sorted(counts)}


def _beginning(settings: TrainSettings, order: Order) -> str:
    ids: list[int] = order.batch(0, 1)[0][0, :48].tolist()
    if tokenizer_name(settings) == BYTES:
        return repr(bytes(i for i in ids if i < 256).decode(errors="replace"))
    from colrow.generation.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_name(settings))
    return repr(
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
