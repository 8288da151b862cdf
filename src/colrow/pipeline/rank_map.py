"""Which rank does what, for a person: the grid of ranks with their layers. No torch."""

from __future__ import annotations

from colrow.models.stages import LayerSplit


def rank_map(tp: int, dp: int, split: LayerSplit) -> str:
    """A line for each pipeline rank: its layers, and the numbers of its ranks by dp rank.

    tp is innermost, so that its ranks are inside a host where they fit; then dp, then pp.
    """
    total = tp * dp * split.ranks
    lines = [f"{total} rank{'s' * (total > 1)} = pp {split.ranks} x dp {dp} x tp {tp}"]
    if split.ranks == 1:
        return lines[0]
    for pp in range(split.ranks):
        layers = ", ".join(
            ("embedding, " if stage.is_first else "")
            + _range("layer", stage.start, stage.stop)
            + (", head" if stage.is_last else "")
            for stage in split.of_rank(pp)
        )
        ranks = [
            _range("rank", first, first + tp)
            for first in range(pp * dp * tp, (pp + 1) * dp * tp, tp)
        ]
        lines.append(f"  pp {pp}: {layers}; {' | '.join(ranks)}")
    return "\n".join(lines)


def _range(what: str, start: int, stop: int) -> str:
    return f"{what} {start}" if stop == start + 1 else f"{what}s {start}-{stop - 1}"
