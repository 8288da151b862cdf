"""Tensor shards of unequal size: who holds how much, and that the numbers stay transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.bench import measure, subjects
from colrow.bench.result import BenchSettings
from colrow.cli import main
from colrow.comm.collectives import gather_from_tp
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.models.config import common_attention, num_parameters
from colrow.models.decoder import Decoder
from colrow.planner.catalog import find_model
from colrow.train.settings import TrainSettings
from colrow.train.starting_model import build_model
from colrow.verification.comparison import relative_error
from colrow.verification.traffic import dry_run, record_step
from colrow.verification.verify import verify
from tests.models import tiny
from tests.ranks import RankPool

# Fused QKV of both kinds, KV heads that are cut, tied embeddings, biases, ALiBi, norms on heads.
NAMES = ["llama-biased-tied", "qwen2", "qwen3", "gpt2", "gpt_neox", "bloom"]


def compare(
    tp: ParallelGroup, root: Path, split: str, sequence_parallel: bool
) -> dict[str, tuple[float, float, float, bool, bool]]:
    """Errors of logits, loss and worst gradient; whether all gradients and calls are there."""
    found = {}
    for name in NAMES:
        expected = torch.load(root / f"{name}-torch.float64.pt", weights_only=True)
        model = colrow.from_pretrained(
            root / name, tp, sequence_parallel=sequence_parallel, tensor_split=split
        )
        ids = tiny.batch()
        logits = gather_from_tp(model(ids), tp, partition=model.vocab)
        loss = model.loss(ids, ids)
        loss.backward()
        grads = colrow.full_grads(model)
        predicted = record_step(model, batch=2, sequence=5).equal
        if tp.rank == 0:
            worst = max(relative_error(grads[key], grad) for key, grad in expected["grads"].items())
            errors = (
                relative_error(logits, expected["logits"]),
                relative_error(loss, expected["loss"]),
            )
            found[name] = (*errors, worst, grads.keys() == expected["grads"].keys(), predicted)
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence_parallel"])
@pytest.mark.parametrize("split", ["2,1", "0.2,0.5,0.3"])
def test_unequal_shards_give_the_numbers_of_transformers(
    ranks: RankPool, tiny_models: Path, split: str, sequence_parallel: bool
) -> None:
    count = split.count(",") + 1
    found = ranks(count, compare, tiny_models, split, sequence_parallel)[0]
    assert list(found) == NAMES
    for name, (logits, loss, gradient, complete, predicted) in found.items():
        assert max(logits, loss, gradient) <= 1e-12, name
        assert complete and predicted, name


def weights(tp: ParallelGroup, root: Path, split: str) -> tuple[list[int], dict[str, Any]]:
    """Elements of each parameter here; the initial weights, put together."""
    model = colrow.from_config(root / "qwen2", tp, tensor_split=split, seed=3)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert model.weight_bytes_per_rank()[tp.rank] == 4 * held
    block = model.config.blocks[0]
    heads, vocab = block.attention.heads(model.division).query, model.vocab
    ffn = model.division.of(block.mlp.ffn_size)
    return (
        [part.size(tp.rank) for part in (heads, ffn, vocab)],
        colrow.full_state_dict(model),
    )


def test_each_rank_holds_its_share_and_initial_weights_stay(
    ranks: RankPool, tiny_models: Path
) -> None:
    whole = ranks(1, weights, tiny_models, "")[0][1]
    found = ranks(3, weights, tiny_models, "3,2,1")
    for share, (sizes, _) in zip((3, 2, 1), found, strict=True):
        for size, length in zip(sizes, (9, 101, 97), strict=True):
            assert abs(size - length * share / 6) < 1
    assembled = found[0][1]
    assert assembled.keys() == whole.keys()
    assert all(torch.equal(assembled[name], whole[name]) for name in whole)


def test_memory_of_a_large_model_is_in_the_ratio_within_a_head() -> None:
    config = find_model("llama-3-8b").config
    split = (0.5, 0.3, 0.2)
    division, attention = config.divide(3, split), common_attention(config)
    assert sum(attention.heads(division).query.sizes) == 32
    per_head = attention.head_dim * config.hidden_size * 2 * config.num_layers
    per_kv_head = attention.head_dim * config.hidden_size * 2 * config.num_layers
    one_more = per_head + 2 * per_kv_head + 3 * config.hidden_size * config.num_layers
    one_more += 2 * config.hidden_size + (2 * config.num_layers + 1) * config.hidden_size
    for rank, share in enumerate(split):
        model = colrow.Decoder(
            config, ParallelGroup(_NoGroup(), rank, 3), division=division, device="meta"
        )
        held = sum(parameter.numel() for parameter in model.parameters())
        assert abs(held - share * num_parameters(config)) <= one_more


class _NoGroup:
    """Stands where a process group would: on meta nothing is sent."""


@pytest.mark.parametrize(
    ("tp", "split", "message"),
    [
        (2, "2", r"the tensor split 2 has 1 number for a tensor-parallel size of 2"),
        (2, "3,2,1", r"the tensor split 3,2,1 has 3 numbers for a tensor-parallel size of 2"),
        (2, "2,0", "should have positive numbers only"),
        (2, "2,x", "should be numbers with commas between"),
        (2, (1, float("nan")), "should have positive numbers only"),
        (2, "99,1", r"gives the ranks 32,0 of the model's 32 query heads, none to rank 1: every"),
    ],
)
def test_splits_that_cannot_be(tp: int, split: Any, message: str) -> None:
    config = find_model("llama-3-8b").config
    with pytest.raises(ValueError, match=message):
        config.divide(tp, split)


def different(tp: ParallelGroup, root: Path) -> None:
    model = colrow.from_pretrained(root / "qwen2", tp, tensor_split=("2,1", "1,2")[tp.rank])
    model(tiny.batch())


def test_ranks_with_different_splits_are_refused(ranks: RankPool, tiny_models: Path) -> None:
    with pytest.raises(AssertionError, match="divide the model differently"):
        ranks(2, different, tiny_models)


def test_collectives_of_unequal_shards_are_predicted_for_any_model() -> None:
    config = find_model("gpt2").config
    for sequence_parallel in (False, True):
        found = dry_run(
            config,
            3,
            batch=1,
            sequence=7,
            sequence_parallel=sequence_parallel,
            tensor_split="5,4,3",
            rank=1,
        )
        assert found.equal and found.recorded


def commanded(tp: ParallelGroup, path: Path) -> list[tuple[int, ...]]:
    """Query heads by rank in the models that verify, train and bench make."""
    one = ParallelGroup.single
    mesh = Mesh(tp, one("dp"), one("pp"), None, torch.get_default_device())
    report = verify(path, mesh, dtype=torch.float64, tensor_split="2,1", new_tokens=1)
    found = [] if report is None else [tuple(query for query, _ in report.heads_per_rank)]
    assert report is None or report.passed
    common: dict[str, Any] = {"data": "d", "output": "o", "tp": 2, "tensor_split": "2,1"}
    for model in (path, path / "config.json"):
        trained = build_model(TrainSettings(model=str(model), **common), mesh)
        found.append(trained.config.blocks[0].attention.heads(trained.division).query.sizes)
    made: list[Decoder] = []

    def noted(*args: Any, **options: Any) -> Decoder:
        made.append(colrow.from_config(*args, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "from_config", noted)
        measure.subjects(BenchSettings(trained.config, "block", 1, 4, tensor_split="2,1"), mesh)
    return [*found, made[0].config.blocks[0].attention.heads(made[0].division).query.sizes]


def test_verify_train_and_bench_divide_by_it(ranks: RankPool, tiny_models: Path) -> None:
    assert ranks(2, commanded, tiny_models / "qwen2")[0] == [(6, 3)] * 4


def test_commands_take_the_split(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["comms", "gpt2", "--tp", "3", "--tensor-split", "5,4,3", "--sequence", "8"]
    assert main(arguments) == 0
    assert "are equal" in capsys.readouterr().out
    assert main(["comms", "gpt2", "--tp", "2", "--tensor-split", "50,1"]) == 2
    assert "gives the ranks 12,0 of the model's 12 query heads" in capsys.readouterr().err
