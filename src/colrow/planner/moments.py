"""What a step needs for a moment beside what it keeps: where memory is fullest."""

from __future__ import annotations

from colrow.layers.describe import BlockSpec
from colrow.models.config import ModelConfig
from colrow.planner.activations import Sizes, block_bytes, head_bytes
from colrow.planner.layout import Layout

# Masks that follow the global position are computed from 64-bit integers, a piece at a time: the
# positions and two temporaries of the mixing function (colrow.rng.keep_mask).
MASK_TEMPORARIES = 3 * 8
MASK_PIECE = 1 << 18


def moments(
    config: ModelConfig,
    block: BlockSpec,
    layout: Layout,
    rank: int,
    *,
    last_stage: bool,
    flash: bool,
) -> dict[str, float]:
    """Bytes beyond everything kept, at each moment that can be the fullest.

    "Everything kept" counts the blocks, the final norm and the head's input, but not the fp32
    probabilities of the loss, which live for two of these moments only.
    """
    item, sizes = layout.itemsize, Sizes.of(block, layout, rank)
    hidden, vocab = config.hidden_size, layout.division.of(config.vocab_size).size(rank)
    mlp, times = block.mlp.passes[0]
    ffn = layout.division.of(mlp.ffn_size).size(rank)
    norm_and_input, probabilities = head_bytes(config, layout, rank)
    after_blocks = norm_and_input if last_stage else 0.0
    # A tied head's weight gradient waits for the embedding's, to be added to it.
    waiting = vocab * hidden * item if last_stage and config.tie_embeddings else 0.0
    width = 2 if mlp.gated else 1
    # Backward of the second linear layer and of the activation: gradients of what went in and out.
    down = sizes.ffn + hidden * ffn * item
    activation = sizes.ffn * width
    up = hidden * width * ffn * item + sizes.full - sizes.ffn * width
    found = {
        "mlp backward": sizes.full + max(down, activation, up) + waiting - after_blocks,
    }
    written = layout.program.written_dropout
    if block.dropout and written:
        drawn = _drawing_bytes(sizes.residual / item)
        found["dropout mask"] = drawn + 2 * sizes.residual - after_blocks
    if block.attention.dropout and written and not flash:
        later = block_bytes(block, layout, rank, flash=flash)
        later_bytes = later["mlp"] + (later["norms"] + later["linear inputs"]) / 2
        later_bytes += later["dropout"] + sizes.query
        # The masked scores, and for narrow ones the softmax's narrow copy, while the mask is drawn
        # and then while the result, which is kept, is made.
        alive = sizes.scores * (item + (item if item < 4 else 0))
        alive += max(0.0, _drawing_bytes(sizes.scores) - sizes.scores * item)
        found["attention dropout mask"] = alive - later_bytes - after_blocks
    if last_stage:
        logits = layout.tokens * vocab
        widened = 4 if item < 4 else 0
        found["loss"] = logits * (item + widened) + probabilities
        found["head backward"] = logits * item + vocab * hidden * item + sizes.full
    if times > 1:  # copies of the tokens, sorted by expert
        found["mlp backward"] += 2 * times * sizes.full
    return found


def _drawing_bytes(elements: float) -> float:
    return min(elements, MASK_PIECE) * MASK_TEMPORARIES


def embedding_backward_bytes(
    config: ModelConfig, layout: Layout, rank: int, *, tied_elsewhere: bool = False
) -> float:
    """At the end of backward, when nothing kept is left: gradients of the embedding.

    A dense one; with a tied head on the same stage the head's, the embedding's and their sum.
    """
    vocab = layout.division.of(config.vocab_size).size(rank)
    size = vocab * config.hidden_size * layout.itemsize
    tied = config.tie_embeddings and not tied_elsewhere
    return float(size * (3 if tied else 1))
