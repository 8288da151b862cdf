"""What forward keeps for backward, per rank and microbatch.

Counted tensor by tensor from the architecture. For a GPT with dropout whose attention stores its
scores this gives the s b h (34 + 5 a s / h) bytes of Korthikanti et al. 2022, equation 1, and their
equations 2 and 4 for tensor and sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from colrow.layers.describe import (
    Attention,
    AttentionSpec,
    BlockSpec,
    ExpertsSpec,
    LatentAttentionSpec,
    MLPSpec,
    NormSpec,
)
from colrow.models.config import ModelConfig
from colrow.planner.layout import Layout
from colrow.planner.model import key_value_numbers


@dataclass(frozen=True)
class Sizes:
    """Bytes of one microbatch's tensors on one rank.

    Attributes:
        full: ``[tokens, hidden]``.
        residual: the same where norms and residuals work: divided with sequence parallelism.
        query, key_value: of the local heads; the latter of keys or of values, their mean where
            they differ.
        ffn: ``[tokens, ffn_local]`` of the MLP, or over the active experts.
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
    def of(cls, block: BlockSpec, layout: Layout, rank: int) -> Sizes:
        """The sizes on tensor-parallel rank ``rank``."""
        attention, item, tokens = block.attention, layout.itemsize, layout.tokens
        heads = attention.heads(layout.division).query.size(rank)
        keys = min(attention.window or layout.sequence, layout.sequence)
        mlp, times = block.mlp.passes[0]
        key_value = key_value_numbers(attention, layout.division, rank)
        return cls(
            full=float(tokens * block.hidden_size * item),
            residual=residual_bytes(block.hidden_size, layout),
            query=float(tokens * heads * attention.key_size * item),
            key_value=tokens * key_value / 2 * item,
            ffn=float(tokens * times * layout.division.of(mlp.ffn_size).size(rank) * item),
            scores=float(layout.microbatch * heads * layout.local_sequence * keys),
            item=item,
        )


def residual_bytes(hidden_size: int, layout: Layout) -> float:
    """Bytes of ``[tokens, hidden]`` where norms and residuals work."""
    parts = layout.tp if layout.sequence_parallel else 1
    rows = layout.microbatch * -(-layout.local_sequence // parts)
    return float(rows * hidden_size * layout.itemsize)


def block_bytes(block: BlockSpec, layout: Layout, rank: int, *, flash: bool) -> dict[str, float]:
    """What one block keeps without recomputing the block, by part."""
    sizes, tokens = Sizes.of(block, layout, rank), layout.tokens
    latent = dispatched = shared = 0.0
    if isinstance(block.attention, LatentAttentionSpec):
        # The compressed queries, keys and values, before and after their norms.
        compressed = block.attention.query_rank + block.attention.kv_rank
        latent = float(tokens * (2 * compressed + block.attention.rotated) * sizes.item)
    if isinstance(block.mlp, ExpertsSpec):
        # The experts' inputs, sorted, and their results, which the router's weights multiply.
        dispatched = 2 * sizes.residual * block.mlp.active
        for mlp, _ in block.mlp.passes[1:]:
            ffn = layout.division.of(mlp.ffn_size).size(rank)
            shared += float(tokens * (3 if mlp.gated else 2) * ffn * sizes.item)
    gathered = layout.program.keep_gathered_input and layout.sequence_parallel
    copies = 1 if block.one_norm and not gathered else 2
    inputs = copies * _column_input(block.hidden_size, layout)
    mlp_bytes = _mlp(block.mlp.passes[0][0], layout, sizes)
    if layout.precision == "fp8":
        # Linear layers keep their inputs in 8 bits; the attention's output is kept wide too, since
        # attention's backward reads it.
        inputs, mlp_bytes = inputs / sizes.item, mlp_bytes - sizes.ffn * (1 - 1 / sizes.item)
    adapters = 0.0
    if layout.lora_rank:  # between the two matrices of each adapter
        adapters = 4.0 * layout.tokens * layout.lora_rank * sizes.item
    return {
        "adapters": adapters,
        "norms": _norms(block, layout),
        "latent attention": latent,
        "shared expert": shared,
        "tokens sent to experts": dispatched,
        "linear inputs": inputs,
        "attention": _attention(block, layout, sizes, rank, flash=flash),
        "mlp": mlp_bytes,
        "dropout": 2 * sizes.residual / sizes.item if block.dropout else 0.0,
    }


def _norms(block: BlockSpec, layout: Layout) -> float:
    """The inputs of all norms; with a parallel residual those in front of the layers have one."""
    norms = list(block.norms.values())
    found = sum(_norm(norm, layout) for norm in norms)
    both_before = block.attention_norm is not None and block.mlp_norm is not None
    if block.parallel_residual and both_before and not any(_is_written(n, layout) for n in norms):
        found -= residual_bytes(block.hidden_size, layout)
    return found


def _norm(norm: NormSpec, layout: Layout) -> float:
    """The input; or an fp32 copy of it instead, and what is multiplied with the weight."""
    kept = residual_bytes(norm.size, layout)
    return _written(norm, layout) * kept if _is_written(norm, layout) else kept


def _written(norm: NormSpec, layout: Layout, copies: int = 1) -> float:
    """What a norm that is written out keeps, in sizes of its input, of which it makes copies."""
    return 4 * copies / layout.itemsize + (4 / layout.itemsize if norm.wide else 1)


def _normed_heads(attention: Attention, layout: Layout, sizes: Sizes) -> float:
    """What the norms of queries and keys keep beside the fused tensor that they read.

    Those over all heads widen their input twice, for the squares and for the result, and are
    written out in fp32 too.
    """
    norm = attention.query_norm if isinstance(attention, AttentionSpec) else None
    if norm is None:
        return 0.0
    together = norm.size != attention.key_size
    if _is_written(norm, layout):
        times = _written(norm, layout, copies=2 if together else 1)
    else:
        times = 1.0 if together or layout.program.fused_elementwise else 0.0
    return (sizes.query + sizes.key_value) * times


def _is_written(norm: NormSpec, layout: Layout) -> bool:
    """Whether it is an RMSNorm of narrow inputs that is written out."""
    fused = layout.program.fused_elementwise or layout.itemsize >= 4
    return norm.kind == "rmsnorm" and not fused


def _column_input(hidden_size: int, layout: Layout) -> float:
    """The input of QKV, or of the MLP: gathered, when it is kept gathered."""
    kept = layout.program.keep_gathered_input and layout.tp > 1
    if kept or not layout.sequence_parallel:
        return float(layout.tokens * hidden_size * layout.itemsize)
    return residual_bytes(hidden_size, layout)


def _attention(block: BlockSpec, layout: Layout, sizes: Sizes, rank: int, *, flash: bool) -> float:
    """The fused Q, K, V; rotated or normed copies; the scores where they are stored; the output."""
    attention = block.attention
    normed = _normed_heads(attention, layout, sizes)
    if not flash and (per_score := _written_out(attention, layout)):
        # Contiguous copies of queries, keys and values take the place of the fused tensor.
        scores = 0.0 if layout.recompute == "selective" else sizes.scores
        return 2 * (sizes.query + sizes.key_value) + normed + scores * per_score
    output = sizes.query * attention.value_size / attention.key_size
    kept = sizes.query + 2 * sizes.key_value + output + normed
    if attention.rotates:
        kept += sizes.query + sizes.key_value
    if len(attention.heads(layout.division).runs(rank)) > 1:
        kept += sizes.query  # one call per run of heads, and their results side by side
    if flash:
        return kept + 4 * sizes.scores / layout.sequence  # a log-sum-exp per row
    if layout.recompute == "selective":
        return kept
    if not attention.dropout:
        return kept + sizes.scores * sizes.item
    return kept + sizes.scores * (2 * sizes.item + 1)


def _written_out(attention: Attention, layout: Layout) -> int:
    """Bytes that are kept of a score where attention is written out; 0 where it is not.

    Softmax is kept in fp32, beside the mask of dropout and the product of both, or what the values
    are multiplied by, and the tangent of a soft cap.
    """
    item, drops = layout.itemsize, attention.dropout > 0
    if not layout.program.written_dropout or (attention.plain_scores and not drops):
        return 0
    capped = sinks = False
    if isinstance(attention, AttentionSpec):
        capped, sinks = attention.softcap is not None, attention.sinks
    copied = drops or sinks or item != 4
    return 4 + int(drops) + item * (int(copied) + int(capped))


def _mlp(mlp: MLPSpec, layout: Layout, sizes: Sizes) -> float:
    """Inputs of the activation and of the second linear layer."""
    if mlp.gated:
        program = layout.program
        return sizes.ffn * (3 if program.fused_elementwise and program.fused_gate else 4)
    if mlp.activation == "relu":
        return sizes.ffn
    if mlp.activation == "gelu_bloom" and not layout.program.fused_elementwise:
        return sizes.ffn * 8  # written out: seven intermediate products and the result
    return sizes.ffn * 2


def context_bytes(block: BlockSpec, layout: Layout, rank: int) -> float:
    """What all blocks of a kind on a stage share: the biases of ALiBi."""
    if not (isinstance(block.attention, AttentionSpec) and block.attention.alibi):
        return 0.0
    sizes = Sizes.of(block, layout, rank)
    return sizes.scores / layout.microbatch * sizes.item


def embedding_bytes(config: ModelConfig, layout: Layout) -> float:
    """The dropout's mask after the embedding (Korthikanti et al. 2022, section 4.3), its norm."""
    residual = residual_bytes(config.hidden_size, layout)
    kept = 0.0
    if config.embedding_dropout:
        kept += residual / layout.itemsize
    if config.embedding_norm is not None:
        kept += residual
    return kept


def head_bytes(config: ModelConfig, layout: Layout, rank: int) -> tuple[float, float]:
    """The final norm with the head's input, and what is kept of logits: fp32 probabilities."""
    logits = layout.tokens * layout.division.of(config.vocab_size).size(rank)
    norm_and_input = _norm(config.norm, layout) + _column_input(config.hidden_size, layout)
    capped = layout.itemsize if config.logit_softcap is not None else 0
    return norm_and_input, (4.0 + capped) * logits
