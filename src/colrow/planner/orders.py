"""What each pipeline device does in which order, for drawing a step. No torch."""

from __future__ import annotations

from colrow.pipeline.schedules import Action
from colrow.planner.layout import Layout


def pipeline_order(layout: Layout) -> list[list[Action]] | None:
    """The actions of every device; None for schedules that are not drawn (zero-bubble).

    GPipe: all forwards, then all backwards. 1F1B: as many forwards ahead as stages follow, then one
    forward and one backward in turn (Narayanan et al. 2021, section 2.2.1). Interleaved: the same
    over chunks, of which a device takes ``pp`` microbatches of one before it takes the next
    (section 2.2.2).
    """
    stages, count, chunks = layout.pp, layout.num_microbatches, layout.virtual_stages
    if layout.schedule in ("zb-h1", "zb-h2"):
        return None
    found = []
    for device in range(stages):
        forward = [_turn(turn, device, stages, chunks) for turn in range(count * chunks)]
        backward = [_turn(turn, device, stages, chunks, True) for turn in range(count * chunks)]
        if layout.schedule == "gpipe":
            ahead = len(forward)
        elif chunks > 1:
            ahead = min(len(forward), 2 * (stages - device - 1) + (chunks - 1) * stages)
        else:
            ahead = min(len(forward), stages - device - 1)
        actions = forward[:ahead]
        for index, action in enumerate(backward):
            if ahead + index < len(forward):
                actions.append(forward[ahead + index])
            actions.append(action)
        found.append(actions)
    return found


def _turn(turn: int, device: int, stages: int, chunks: int, backward: bool = False) -> Action:
    """The ``turn``-th forward or backward of a device."""
    chunk = turn // stages % chunks
    if backward:
        chunk = chunks - 1 - chunk
    microbatch = turn // (stages * chunks) * stages + turn % stages if chunks > 1 else turn
    return Action(chunk * stages + device, "backward" if backward else "forward", microbatch)
