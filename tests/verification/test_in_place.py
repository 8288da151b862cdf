"""The comparison passes what is right and sees what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.tiny_models.architectures import Architecture, architectures
from colrow.verification.in_place import Outcome, compare_on
from tests.ranks import RankPool


def compared(
    tp: ParallelGroup,
    architecture: Architecture,
    harm: str = "",
    dtype: torch.dtype = torch.float64,
) -> Outcome | None:
    """Compares on the pool's ranks; ``harm`` is a parameter that the last rank gets wrong."""
    single = ParallelGroup.single
    mesh = Mesh(tp, single("dp"), single("pp"), None, torch.device("cpu"))

    def tamper(model: nn.Module, rank: int) -> None:
        if harm and rank == tp.size - 1:
            with torch.no_grad():
                model.get_parameter(harm).view(-1)[0] += 1e-6

    return compare_on(mesh, architecture, tamper=tamper, dtype=dtype)


@pytest.mark.parametrize("tp", [2, 3])
def test_a_right_split_passes(ranks: RankPool, tp: int) -> None:
    outcome = ranks(tp, compared, Architecture("llama"))[0]
    assert outcome.verdict == "passed", outcome
    assert outcome.greedy and outcome.share > 0.9
    assert max(outcome.output_error, outcome.loss_error, outcome.gradient_error) < 1e-12


@pytest.mark.parametrize(
    ("harm", "where"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1"),
        ("model.embed_tokens.weight", ""),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "lm_head"),  # the other rank's norm is right
    ],
)
def test_one_wrong_number_in_a_shard_fails(ranks: RankPool, harm: str, where: str) -> None:
    outcome = ranks(2, compared, Architecture("llama"), harm)[0]
    assert outcome.verdict == "failed"
    assert "off by" in outcome.reason
    if where:
        assert outcome.first_difference.startswith(where), outcome


def test_what_does_not_run_whole_is_said_with_its_reason(ranks: RankPool) -> None:
    outcome = ranks(2, compared, architectures(["gemma4_assistant"])[0])[0]
    assert outcome.verdict == "not run" and "draft head" in outcome.reason


def test_fp32_is_compared_with_fp64_to_what_rounding_costs(ranks: RankPool) -> None:
    outcome = ranks(2, compared, Architecture("llama"), "", torch.float32)[0]
    assert outcome.verdict == "passed", outcome
    assert 1e-9 < outcome.output_error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "granitemoe",  # asks for a cache whatever its caller says
        "jetmoe",  # experts' weights in modules of their own
        "longcat_flash",  # experts that hand tokens on
        "reformer",  # reversible layers
        "rwkv",  # a state whose size the model itself decides
        "xlnet",  # projections that are parameters of the attention
        "zaya",  # three layers in a row
    ],
)
def test_types_with_traps_are_split_nearly_whole(ranks: RankPool, name: str) -> None:
    outcome = ranks(3, compared, Architecture(name), timeout=120)[0]
    assert outcome.verdict == "passed", outcome
    assert outcome.share > 0.9
