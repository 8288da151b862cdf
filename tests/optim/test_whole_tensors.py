"""Optimisers that look at whole tensors, on divided ones, against torch's on the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colrow.comm.group import ParallelGroup
from tests.optim.models import MAKERS, batch, decoder, decoder_steps, expected, in_place_steps
from tests.ranks import RankPool
from tests.train.layouts import Layout, make_mesh

DECODERS = [
    ("qwen2", Layout()),
    ("qwen2", Layout(tp=2)),
    ("qwen2", Layout(tp=3, sequence_parallel=True)),
    ("qwen2", Layout(tp=3, tensor_split="1,2,2")),
    ("qwen2", Layout(dp=2)),
    ("qwen2", Layout(dp=2, fsdp=True)),
    ("qwen2", Layout(tp=2, dp=2, fsdp=True, sequence_parallel=True)),
    ("gpt2", Layout(tp=2)),  # Q, K and V in one matrix, stored transposed
    ("gpt2", Layout(tp=2, dp=2, fsdp=True)),
    ("gpt_neox", Layout(tp=3)),  # in one matrix, head by head
]


def compare(
    found: tuple[list[float], dict[str, Tensor]], right: tuple[list[float], dict[str, Tensor]]
) -> None:
    assert found[0] == pytest.approx(right[0], rel=1e-11)
    assert found[1]
    for name, weight in found[1].items():
        torch.testing.assert_close(weight, right[1][name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
@pytest.mark.parametrize(("name", "layout"), DECODERS, ids=str)
def test_the_decoder_moves_as_the_whole_model(
    ranks: RankPool, name: str, layout: Layout, optimizer: str
) -> None:
    found = ranks(layout.ranks, decoder_steps, name, optimizer, layout)[0]
    if layout.dp == 1:
        compare(found, expected(name, optimizer, "decoder"))
    else:  # a loss of each replica
        right = expected(name, optimizer, "decoder")
        compare((right[0], found[1]), right)


@pytest.mark.parametrize("optimizer", ["muon", "muon-adamw", "adafactor"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "phi3"])
def test_models_that_were_split_in_place(ranks: RankPool, name: str, optimizer: str) -> None:
    right = expected(name, optimizer, "transformers")
    compare(ranks(2, in_place_steps, name, optimizer, False)[0], right)
    if name == "phi3":
        found = ranks(4, in_place_steps, name, optimizer, True)[0]
        compare((right[0], found[1]), right)


def test_stacked_experts(ranks: RankPool) -> None:
    right = expected("mixtral", "adafactor", "transformers")
    compare(ranks(2, in_place_steps, "mixtral", "adafactor", False)[0], right)


def with_other_gradients(world: ParallelGroup) -> None:
    model = decoder("qwen2", make_mesh(world, Layout(tp=world.size)), Layout())
    model(batch()).sum().backward()
    if world.rank:
        model.get_parameter("blocks.0.mlp.down.weight").grad = None
    for name in ("muon", "adafactor"):
        with pytest.raises(ValueError, match="have gradients for different parameters"):
            MAKERS[name](model, True)[0].step()


def test_ranks_with_gradients_of_other_parameters_are_refused(ranks: RankPool) -> None:
    ranks(2, with_other_gradients)
