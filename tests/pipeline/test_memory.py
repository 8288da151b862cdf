"""Bytes that autograd keeps, and how many microbatches' of them each schedule keeps on a stage."""

from __future__ import annotations

import torch
from torch import nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.pipeline.kept_activations import KeptActivations
from colrow.pipeline.runner import PipelineRunner
from colrow.pipeline.schedules import Schedule
from tests.pipeline.layouts import UNTIED
from tests.ranks import RankPool


def test_a_storage_counts_once_until_the_last_has_let_go() -> None:
    linear = nn.Linear(4, 8, bias=False)
    x = torch.randn(10, 4)
    with KeptActivations(linear.parameters()) as kept:
        y = linear(x)  # keeps x, and the weight, which does not count
        assert kept.bytes == 10 * 4 * 4
        z = y.view(-1).exp().sum()  # keeps the exponential; the view keeps nothing
        assert kept.bytes == 10 * 4 * 4 + 80 * 4
        again = linear(x)  # the same x
        assert kept.bytes == 10 * 4 * 4 + 80 * 4
        z.backward()
        assert kept.bytes == 10 * 4 * 4
        again.sum().backward()
        assert (kept.bytes, kept.peak_bytes) == (0, 10 * 4 * 4 + 80 * 4)


def test_what_is_never_needed_is_let_go_too() -> None:
    x = torch.randn(5, requires_grad=True)
    with KeptActivations() as kept:
        y = (x * 2).exp()
        assert kept.bytes == 5 * 4
        del y
    assert kept.bytes == 0


RANKS, BATCH, SEQUENCE = 4, 2, 12


def kept_by(world: ParallelGroup, schedule: Schedule, microbatches: int) -> int:
    """Peak bytes of activations on this rank, in a step of a decoder of four layers."""
    mesh = colrow.init_mesh(pp=RANKS, device="cpu")
    model = colrow.from_config({**UNTIED, "num_hidden_layers": RANKS}, mesh, dtype=torch.float64)
    runner = PipelineRunner(
        model.train(),
        mesh,
        schedule,
        microbatches=microbatches,
        microbatch=BATCH,
        sequence=SEQUENCE,
    )
    ids = torch.randint(257, (microbatches, BATCH, SEQUENCE))
    with KeptActivations(model.parameters()) as kept:
        runner.backward([(part, part, number) for number, part in enumerate(ids)], 1.0)
    assert kept.bytes == 0
    return kept.peak_bytes


def test_1f1b_keeps_the_stages_behind_and_gpipe_all(ranks: RankPool) -> None:
    """Narayanan et al. 2021, section 2.2.1: min(p - stage, m) microbatches against m.

    To the byte: what a stage keeps of one microbatch follows from GPipe at two sizes. The token
    ids, which the first stage keeps, are one tensor for all microbatches.
    """
    microbatches = 6
    few, many = (ranks(RANKS, kept_by, "gpipe", m) for m in (2, microbatches))
    found = ranks(RANKS, kept_by, "1f1b", microbatches)
    ids = BATCH * SEQUENCE * 8
    for stage in range(RANKS):
        once = microbatches * ids if stage == 0 else 0
        of_one = (many[stage] - few[stage]) // 4 - (ids if stage == 0 else 0)
        assert many[stage] == microbatches * of_one + once
        assert found[stage] == min(RANKS - stage, microbatches) * of_one + once
