"""Which layers a stage holds, what is refused, and what each rank builds and loads."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.models.config import ModelConfig
from colrow.models.stages import Costs, LayerSplit, balanced
from colrow.pipeline.limits import check_schedule, schedule_named, split_for
from colrow.pipeline.rank_map import rank_map
from colrow.pipeline.runner import PipelineRunner
from colrow.pipeline.schedules import Schedule
from colrow.planner.stage_costs import planned_costs
from colrow.train.settings import TrainSettings
from tests.pipeline.layouts import TIED, Pipe, make_mesh
from tests.ranks import RankPool


def config(layers: int = 4, **keys: Any) -> ModelConfig:
    return colrow.from_config({**TIED, "num_hidden_layers": layers, **keys}, device="meta").config


def sizes(layers: int, ranks: int, split: object, **options: Any) -> tuple[int, ...]:
    return LayerSplit.create(config(layers), ranks, split, **options).sizes  # type: ignore[arg-type]


def test_numbers_that_add_up_are_layers_and_others_are_shares() -> None:
    assert sizes(4, 2, "3,1") == (3, 1)
    assert sizes(30, 2, "2,1") == (20, 10)
    assert sizes(10, 3, "0.5,0.3,0.2") == (5, 3, 2)
    assert sizes(10, 3, [2, 3, 5]) == (2, 3, 5)
    # A rank's layers are divided over its stages, which go round, or there and back.
    assert sizes(7, 2, "5,2", stages_per_rank=2) == (3, 1, 2, 1)
    assert sizes(7, 2, "5,2", stages_per_rank=2, v_shaped=True) == (3, 1, 1, 2)
    assert sizes(7, 2, "1,2,1,3", stages_per_rank=2) == (1, 2, 1, 3)


def test_each_block_is_on_one_stage_and_a_v_ends_where_it_began() -> None:
    split = LayerSplit((2, 1, 1, 3), 2, v_shaped=True)
    assert [split.rank_of(stage) for stage in range(4)] == [0, 1, 1, 0]
    assert split.layers_of_rank(0) == [0, 1, 4, 5, 6]
    assert split.layers_of_rank(1) == [2, 3]
    assert split.last_rank == 0
    specs = config(7).parameters(config(7).divide(1))
    held = [split.held(specs, rank, tied=True) for rank in (0, 1)]
    assert held[0].keys() | held[1].keys() == specs.keys()
    assert not held[0].keys() & held[1].keys()
    ends = [LayerSplit((3, 4), 2).held(specs, rank, tied=True) for rank in (0, 1)]
    assert ends[0].keys() & ends[1].keys() == {"embedding.weight"}


@pytest.mark.parametrize(
    "costs", [Costs(0, 1, 0), Costs(0.5, 1, 2.2), Costs(3.1, 1, 0), Costs(0, 2, 9)]
)
def test_no_other_split_has_a_faster_slowest_stage(costs: Costs) -> None:
    def slowest(of: tuple[int, ...]) -> float:
        times = [count * costs.block for count in of]
        times[0] += costs.first
        times[-1] += costs.last
        return max(times)

    for layers, stages in ((5, 2), (7, 3), (8, 4)):
        found = balanced(layers, stages, costs)
        every = [of for of in product(range(1, layers), repeat=stages) if sum(of) == layers]
        assert sum(found) == layers
        assert slowest(found) == min(map(slowest, every))


def test_a_large_head_takes_layers_from_its_stage() -> None:
    large = config(12, vocab_size=20000)
    costs = planned_costs(large, tp=1, microbatch=1, sequence=512, precision="bf16")
    split = split_for(large, 2, "1f1b", costs=costs)
    assert split.sizes[0] > split.sizes[1]
    assert balanced(12, 2, Costs(0, 1, 0)) == (6, 6)


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble", "zbv"])
def test_one_rank_has_one_stage_whatever_the_schedule(schedule: Schedule) -> None:
    for stages in (0, 2):
        assert split_for(config(), 1, schedule, stages_per_rank=stages).sizes == (4,)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: sizes(4, 2, "3,1,1"), "has 3 numbers for 2 pipeline ranks: give one for each"),
        (lambda: sizes(4, 2, "3;1"), "should be numbers with commas"),
        (lambda: sizes(4, 2, "4,0"), "positive numbers"),
        (lambda: sizes(4, 2, "100,1"), "leaves stage 1 without a layer"),
        (lambda: sizes(4, 5, None), "need at least as many layers, and the model has 4"),
        (lambda: split_for(config(), 2, "1f1b", stages_per_rank=2), "has one stage on each rank"),
        (lambda: split_for(config(), 2, "zbv", stages_per_rank=1), "two stages on each rank"),
        (lambda: split_for(config(), 2, "interleaved", stages_per_rank=1), "use 1f1b"),
        (lambda: schedule_named("dualpipe"), "must be one of gpipe, 1f1b"),
        (lambda: check_schedule("1f1b", LayerSplit((2, 2), 2), 1), "a step has 1"),
        (lambda: check_schedule("interleaved", LayerSplit((1,) * 4, 2), 5), "2 equal rounds"),
        (
            lambda: check_schedule("zbv", LayerSplit((1,) * 4, 2, True), 4, recompute="full"),
            "use recompute=none",
        ),
        (
            lambda: check_schedule("zero-bubble", LayerSplit((2, 2), 2), 4, fsdp=True),
            "FSDP2 does not see them",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_a_reason(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def test_microbatches_and_their_size_follow_from_each_other() -> None:
    def of(**options: Any) -> tuple[int, int]:
        found = TrainSettings(model="m", data="d", output="o", global_batch=16, **options)
        return found.microbatch, found.microbatches

    assert of() == (1, 16)
    assert of(dp=2, microbatches=4) == (2, 4)
    assert of(dp=2, microbatch=4) == (4, 2)
    with pytest.raises(ValueError, match="multiple of dp x microbatches = 1 x 3"):
        of(microbatches=3)
    with pytest.raises(ValueError, match="leave one of microbatches and microbatch out"):
        of(microbatch=2, microbatches=4)


def test_the_map_of_ranks() -> None:
    assert rank_map(2, 2, LayerSplit((3, 1), 2)).splitlines() == [
        "8 ranks = pp 2 x dp 2 x tp 2",
        "  pp 0: embedding, layers 0-2; ranks 0-1 | ranks 2-3",
        "  pp 1: layer 3, head; ranks 4-5 | ranks 6-7",
    ]


def loaded(pp: ParallelGroup, path: Path) -> tuple[list[str], dict[str, torch.Tensor], str]:
    mesh = make_mesh(pp, Pipe())
    model = colrow.from_pretrained(path, mesh, dtype=torch.float64, layer_split="1,1")
    hidden = torch.zeros(1, 3, model.config.hidden_size, dtype=torch.float64)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    try:
        model.loss(ids, ids) if pp.rank == 0 else model(ids)
        message = ""
    except ValueError as error:
        message = str(error)
    shape = model(ids if pp.rank == 0 else hidden).shape
    assert shape[-1] == (model.config.hidden_size if pp.rank == 0 else model.config.vocab_size)
    names = [name for name, _ in model.named_parameters()]
    return names, colrow.full_state_dict(model), message


def test_a_rank_loads_its_stage_alone_under_the_names_of_the_whole(
    ranks: RankPool, tiny_models: Path
) -> None:
    path = tiny_models / "gpt2"
    whole = colrow.full_state_dict(colrow.from_pretrained(path, dtype=torch.float64))
    (first, weights, no_loss), (last, nothing, no_ids) = ranks(2, loaded, path)
    assert {name.split(".")[0] for name in first} == {"embedding", "positions", "blocks"}
    assert {name.split(".")[0] for name in last} == {"embedding", "norm", "blocks"}
    assert not {n for n in first if n in last} - {"embedding.weight"}
    assert "has no head and so no loss" in no_loss
    assert "should get the hidden states of the stage before" in no_ids
    assert nothing == {}
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def different_seeds(pp: ParallelGroup) -> None:
    colrow.from_config(TIED, make_mesh(pp, Pipe()), seed=pp.rank)


def test_stages_with_different_seeds_are_refused(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="this pp group were given different seeds"):
        ranks(2, different_seeds)


def test_a_zero_bubble_schedule_needs_collectives_of_their_own() -> None:
    pair = ParallelGroup.single("pp")
    tp = ParallelGroup.single()
    mesh = Mesh(tp, ParallelGroup.single("dp"), pair, None, torch.device("cpu"))
    model = colrow.from_config(TIED, mesh, device="meta")
    tp.size = 2
    with pytest.raises(
        ValueError, match="needs a model made with sharding=Sharding\\(overlap=False\\)"
    ):
        PipelineRunner(model, mesh, "zbv", microbatches=4, microbatch=1, sequence=8)
