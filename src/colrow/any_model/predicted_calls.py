"""The collectives of a training step of a model that was split in place, foretold.

The split's own record says which modules send, when and what: columns, rows, gathered layers, the
vocabulary, stacks whose tokens are divided. How large it is follows from what the model's code
gives these modules, which nothing but that code knows. So a few forward passes of small shapes
are watched, the record is asked what each of them sends in both directions, and the bytes, which
are linear in the batch and in the sequence, are computed for the shape in question. Where they are
not, or differ from token to token, nothing is foretold.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import nn

from colrow.any_model.senders import UnknownError, Watcher
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call
from colrow.models.communication import INPUT_CHECK_ELEMENTS
from colrow.models.interface import PredictedCalls

_BATCHES = 2, 3


def predict(
    module: nn.Module,
    tp: ParallelGroup,
    forward: Callable[[int, int, int], list[Call]],
    batch: int,
    sequence: int,
) -> PredictedCalls:
    """What a step of ``[batch, sequence]`` tokens sends on this rank.

    Args:
        module: the split model.
        forward: runs the loss of so many rows and tokens, of random ones from a seed, and returns
            what it sends besides the modules of the record.

    Communicates: what five small forward passes send; every rank must call it.
    """
    if tp.size == 1:
        return PredictedCalls(())
    # Shards of a sequence grow in steps of the ranks: the samples have the same remainder.
    first = sequence % tp.size + 2 * tp.size
    second = first + tp.size
    shapes = [(b, s) for s in (first, second) for b in _BATCHES] + [(1, second + tp.size)]
    try:
        seen = [_calls(module, tp, forward, b, s, seed) for seed, (b, s) in enumerate(shapes)]
        kinds = [[(c.op, c.phase, c.layer, c.dtype) for c in calls] for calls in seen]
        if any(other != kinds[0] for other in kinds):
            raise UnknownError("which collectives run depends on the tokens or on their number")
        found = []
        for samples in zip(*seen, strict=True):
            at = [
                _extrapolated(samples, shapes, shape) for shape in (shapes[-1], (batch, sequence))
            ]
            call = samples[0]
            if at[0] != samples[-1].bytes:
                raise UnknownError(
                    f"what {call.layer} sends is not linear in the batch and the sequence, or "
                    "depends on the tokens"
                )
            found.append(Call(call.op, call.phase, call.layer, int(at[1]), call.dtype, tp.name))
    except UnknownError as error:
        return PredictedCalls((), str(error))
    return PredictedCalls(tuple(found))


def _extrapolated(
    samples: tuple[Call, ...], shapes: list[tuple[int, int]], shape: tuple[int, int]
) -> Fraction:
    """``a + b batch + c sequence + d batch sequence`` through the first four samples."""
    (b0, s0), (b1, _), (_, s1) = shapes[0], shapes[1], shapes[2]
    low, low_wide, high, high_wide = (Fraction(call.bytes) for call in samples[:4])
    right, up = Fraction(shape[0] - b0, b1 - b0), Fraction(shape[1] - s0, s1 - s0)
    across = low + (low_wide - low) * right
    across_high = high + (high_wide - high) * right
    return across + (across_high - across) * up


def _calls(
    module: nn.Module,
    tp: ParallelGroup,
    forward: Callable[[int, int, int], list[Call]],
    batch: int,
    sequence: int,
    seed: int,
) -> list[Call]:
    watcher = Watcher(tp)
    with torch.enable_grad(), watcher.watching(module):
        rest = forward(batch, sequence, seed)
    if getattr(module, "check_inputs", False):
        size = 8 * INPUT_CHECK_ELEMENTS
        rest = [Call("all_reduce", "forward", "inputs", size, "int64", tp.name), *rest]
    return rest + watcher.calls
