"""Every family, split, against transformers: logits, loss and all gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import colrow
from colrow.comm.collectives import gather_from_tp
from colrow.comm.group import ParallelGroup
from colrow.models.config import num_parameters
from colrow.verification.comparison import relative_error
from tests.models import tiny
from tests.ranks import RankPool

LIMITS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-6)}


def compare(
    tp: ParallelGroup, root: Path, names: list[str], dtype: torch.dtype, sequence_parallel: bool
) -> dict[str, tuple[float, float, float, int, int]]:
    """Errors of logits, of the loss and of the worst gradient, and how many gradients there are."""
    found = {}
    for name in names:
        expected = torch.load(root / f"{name}-{dtype}.pt", weights_only=True)
        model = colrow.from_pretrained(
            root / name, tp, dtype=dtype, sequence_parallel=sequence_parallel
        )
        ids = tiny.batch()
        logits = gather_from_tp(model(ids), tp, partition=model.vocab)
        loss = model.loss(ids, ids)
        loss.backward()
        grads = colrow.full_grads(model)
        if tp.rank == 0:
            worst = max(relative_error(grads[key], grad) for key, grad in expected["grads"].items())
            errors = (
                relative_error(logits, expected["logits"]),
                relative_error(loss, expected["loss"]),
            )
            found[name] = (*errors, worst, len(grads), len(expected["grads"]))
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence_parallel"])
@pytest.mark.parametrize("dtype", LIMITS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_families_agree_with_transformers(
    ranks: RankPool, tiny_models: Path, size: int, dtype: torch.dtype, sequence_parallel: bool
) -> None:
    names = list(tiny.CASES) if dtype == torch.float64 else tiny.at(size)
    found = ranks(size, compare, tiny_models, names, dtype, sequence_parallel, timeout=180)[0]
    limit, loss_limit = LIMITS[dtype]
    assert list(found) == names
    for name, (logits, loss, gradient, count, expected_count) in found.items():
        assert logits <= limit, name
        assert loss <= loss_limit, name
        assert gradient <= limit, name
        assert count == expected_count, name


def round_trip(tp: ParallelGroup, root: Path, names: list[str]) -> dict[str, list[str]]:
    """Names of the tensors that differ from the file's after loading and assembling."""
    from safetensors.torch import load_file

    wrong = {}
    for name in names:
        model = colrow.from_pretrained(root / name, tp)
        whole = colrow.full_state_dict(model)
        if tp.rank == 0:
            stored = load_file(root / name / "model.safetensors")
            trained = [t for key, t in stored.items() if not key.endswith("correction_bias")]
            assert num_parameters(model.config) == sum(map(Tensor.numel, trained)), name
            wrong[name] = [
                key for key, t in stored.items() if not torch.equal(t.to(whole[key]), whole[key])
            ]
            wrong[name] += list(whole.keys() ^ stored.keys())
    return wrong


@pytest.mark.parametrize("size", [1, 3])
def test_assembled_weights_are_the_files(ranks: RankPool, tiny_models: Path, size: int) -> None:
    wrong = ranks(size, round_trip, tiny_models, list(tiny.CASES))[0]
    assert wrong == {name: [] for name in tiny.CASES}


def initial_weights(tp: ParallelGroup, root: Path, names: list[str]) -> dict[str, float]:
    """A digest of the whole initial weights of each model."""
    digests = {}
    for name in names:
        model = colrow.from_config(root / name, tp, seed=0)
        whole = colrow.full_state_dict(model)
        if tp.rank == 0:
            for key, value in whole.items():
                digests[f"{name}/{key}"] = value
    return digests


def test_initial_weights_do_not_depend_on_the_number_of_ranks(
    ranks: RankPool, tiny_models: Path
) -> None:
    names = ["llama", "gpt2", "bloom", "qwen2"]
    one = ranks(1, initial_weights, tiny_models, names)[0]
    for size in (2, 3, 4):
        several = ranks(size, initial_weights, tiny_models, names)[0]
        assert one.keys() == several.keys()
        assert all(torch.equal(one[key], several[key]) for key in one)
    drawn = one["llama/model.layers.0.mlp.down_proj.weight"]
    assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
    other = one["llama/model.layers.1.mlp.down_proj.weight"]
    assert not torch.equal(drawn, other)
