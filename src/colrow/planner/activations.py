"""What forward keeps for backward, per rank and microbatch.

Counted tensor by tensor from the architecture. For a GPT with dropout whose attention stores its
scores this gives the s b h (34 + 5 a s / h) bytes of Korthikanti et al. 2022, equation 1, and their
equations 2 and 4 for tensor and sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from colrow.layers.describe import Division
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape


@dataclass(frozen=True)
class Sizes:
    """Bytes of one microbatch's tensors on one rank.

    Attributes:
        full: ``[tokens, hidden]``.
        residual: the same where norms and residuals work: divided with sequence parallelism.
        query, key_value: of the local heads; the latter of keys or of values, their mean where
            they differ.
        ffn: ``[tokens, ffn_local]``, over the active experts.
        scores: elements (not bytes) of the attention scores of the local heads.
        item: bytes of an element.
    """

    full: float
    residual: float
    query: float
    key_value: float
    ffn: float
    scores: float
    item: int

    @classmethod
    def of(cls, model: ModelShape, layout: Layout, division: Division, rank: int) -> Sizes:
        """The sizes on tensor-parallel rank ``rank``."""
        config, item = model.config, layout.itemsize
        tokens = layout.tokens
        full = float(tokens * config.hidden_size * item)
        parts = layout.tp if layout.sequence_parallel else 1
        rows = layout.microbatch * -(-layout.local_sequence // parts)
        heads = division.heads.query.size(rank)
        keys = min(config.window(0) or layout.sequence, layout.sequence)
        return cls(
            full=full,
            residual=float(rows * config.hidden_size * item),
            query=float(tokens * heads * model.key_size * item),
            key_value=tokens * model.key_value_numbers(division, rank) / 2 * item,
            ffn=float(tokens * model.active_experts * division.ffn.size(rank) * item),
            scores=float(layout.microbatch * heads * layout.local_sequence * keys),
            item=item,
        )


def block_bytes(
    model: ModelShape, layout: Layout, division: Division, rank: int, *, flash: bool
) -> dict[str, float]:
    """What one block keeps without recomputing the block, by part."""
    config = model.config
    sizes = Sizes.of(model, layout, division, rank)
    latent = dispatched = 0.0
    tokens = layout.tokens
    if model.latent:  # the compressed queries, keys and values, before and after their norms
        compressed = model.latent.query_rank + model.latent.kv_rank
        latent = float(tokens * (2 * compressed + model.latent.rope) * sizes.item)
    widths = 3 if config.gated else 2
    shared = float(tokens * widths * model.shared_ffn_of_rank(layout.tp) * sizes.item)
    if model.experts > 1:
        # The experts' inputs, sorted, and their results, which the router's weights multiply.
        dispatched = 2 * sizes.residual * model.active_experts
    inputs = 2 * _column_input(layout, sizes)
    mlp = _mlp(model, layout, sizes)
    if layout.precision == "fp8":
        # Linear layers keep their inputs in 8 bits; the attention's output is kept wide too, since
        # attention's backward reads it.
        inputs, mlp = inputs / sizes.item, mlp - sizes.ffn * (1 - 1 / sizes.item)
    adapters = 0.0
    if layout.lora_rank:  # between the two matrices of each adapter
        adapters = 4.0 * layout.tokens * layout.lora_rank * sizes.item
    return {
        "adapters": adapters,
        "norms": _norms(model, layout, sizes),
        "latent attention": latent,
        "shared expert": shared,
        "tokens sent to experts": dispatched,
        "linear inputs": inputs,
        "attention": _attention(
            model,
            layout,
            sizes,
            flash=flash,
            split_heads=len(division.heads.runs(rank)) > 1,
        ),
        "mlp": mlp,
        "dropout": 2 * sizes.residual / sizes.item if config.residual_dropout else 0.0,
    }


def _norms(model: ModelShape, layout: Layout, sizes: Sizes) -> float:
    """The norms' inputs. With a parallel residual both norms have one.

    An RMSNorm of narrow inputs that is written out keeps an fp32 copy of each instead, and what it
    multiplies with its weight.
    """
    config = model.config
    inputs = 1 if config.parallel_residual else 2
    if config.norm == "layernorm" or layout.program.fused_elementwise or sizes.item >= 4:
        return inputs * sizes.residual
    return 2 * (4 / sizes.item + 1) * sizes.residual


def _column_input(layout: Layout, sizes: Sizes) -> float:
    """The input of QKV, or of the MLP: gathered, when it is kept gathered."""
    kept = layout.program.keep_gathered_input and layout.tp > 1
    return sizes.full if kept or not layout.sequence_parallel else sizes.residual


def _attention(
    model: ModelShape, layout: Layout, sizes: Sizes, *, flash: bool, split_heads: bool
) -> float:
    """The fused Q, K, V; rotated or normed copies; the scores where they are stored; the output."""
    config, program = model.config, layout.program
    normed = 0.0
    if config.qk_norm and (program.fused_elementwise or sizes.item < 4):
        wide = not program.fused_elementwise
        normed = (sizes.query + sizes.key_value) * (4 / sizes.item + 1 if wide else 1)
    if not flash and program.written_dropout and config.attention_dropout:
        # Contiguous copies of queries, and of keys and values for every query head, take the place
        # of the fused tensor; softmax is kept in fp32, beside the mask and the product of both.
        scores = 0.0 if layout.recompute == "selective" else sizes.scores
        return 4 * sizes.query + normed + scores * (4 + 1 + sizes.item)
    output = sizes.query * model.value_size / model.key_size
    kept = sizes.query + 2 * sizes.key_value + output + normed
    if config.position == "rope":
        kept += sizes.query + sizes.key_value
    if split_heads:
        kept += sizes.query  # one call per run of heads, and their results side by side
    if flash:
        return kept + 4 * sizes.scores / layout.sequence  # a log-sum-exp per row
    if layout.recompute == "selective":
        return kept
    if not config.attention_dropout:
        return kept + sizes.scores * sizes.item
    return kept + sizes.scores * (2 * sizes.item + 1)


def _mlp(model: ModelShape, layout: Layout, sizes: Sizes) -> float:
    """Inputs of the activation and of the second linear layer."""
    config = model.config
    if config.gated:
        return sizes.ffn * (3 if layout.program.fused_elementwise else 4)
    if config.activation == "relu":
        return sizes.ffn
    if config.activation == "gelu_bloom" and not layout.program.fused_elementwise:
        return sizes.ffn * 8  # written out: seven intermediate products and the result
    return sizes.ffn * 2


def context_bytes(model: ModelShape, layout: Layout, division: Division, rank: int) -> float:
    """What all blocks of a stage share: the biases of ALiBi."""
    if model.config.position != "alibi":
        return 0.0
    sizes = Sizes.of(model, layout, division, rank)
    return sizes.scores / layout.microbatch * sizes.item


def embedding_bytes(model: ModelShape, layout: Layout, division: Division, rank: int) -> float:
    """The dropout's mask after the embedding (Korthikanti et al. 2022, section 4.3), its norm."""
    sizes = Sizes.of(model, layout, division, rank)
    kept = 0.0
    if model.config.embedding_dropout:
        kept += sizes.residual / sizes.item
    if model.config.embedding_norm:
        kept += sizes.residual
    return kept


def head_bytes(
    model: ModelShape, layout: Layout, division: Division, rank: int
) -> tuple[float, float]:
    """The final norm with the head's input, and the fp32 probabilities that the loss keeps."""
    sizes = Sizes.of(model, layout, division, rank)
    norm = _norms(model, layout, sizes) / (1 if model.config.parallel_residual else 2)
    logits = layout.tokens * division.vocab.size(rank)
    return norm + _column_input(layout, sizes), 4.0 * logits
