from __future__ import annotations

import pytest
import torch

from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm.group import ParallelGroup
from colrow.models.cache import KeyValueCache
from tests.generation import models
from tests.ranks import RankPool


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_cached_step_equals_a_full_forward_pass(
    n: int, checkpoints: dict[str, str], ranks: RankPool
) -> None:
    for errors in ranks(n, compare_all, checkpoints):
        assert errors.keys() == checkpoints.keys()
        assert max(errors.values()) <= 1e-12, errors


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("cache")
    names = ("llama-biased-tied", "mistral-window", "gpt2", "gpt_neox", "bloom")
    for name in names:
        models.save(name, root / name)
    return {name: str(root / name) for name in names}


def compare_all(tp: ParallelGroup, paths: dict[str, str]) -> dict[str, float]:
    return {name: compare(tp, path) for name, path in paths.items()}


@torch.inference_mode()
def compare(tp: ParallelGroup, path: str) -> float:
    """The largest relative difference over chunks of 9, 1, 1, 3 and 4 tokens."""
    model = from_pretrained(path, tp, dtype=torch.float64)
    model.eval()
    ids, mask = models.prompts()
    ids = torch.cat([ids, ids.flip(0).clamp(min=1)], dim=1)  # [3, 18]
    mask = torch.cat([mask, torch.ones_like(mask)], dim=1)
    full = model(ids, attention_mask=mask)
    cache = model.make_cache(3, capacity=9)
    worst, past = 0.0, 0
    for new in (9, 1, 1, 3, 4):
        past += new
        cached = model.last_logits(
            ids[:, past - new : past], attention_mask=mask[:, :past], cache=cache
        )
        expected = full[:, past - 1]
        worst = max(worst, ((cached - expected).norm() / expected.norm()).item())
        assert cache.length == past
    assert cache.capacity == 18  # doubled once
    return worst


def test_memory_is_what_the_sizes_say() -> None:
    cache = KeyValueCache(3, 2, 4, 8, 10, dtype=torch.float32, device="cpu")
    assert cache.bytes == 3 * 2 * (2 * 4 * 10 * 8) * 4
    assert (cache.length, cache.capacity) == (0, 10)


def test_length_grows_after_the_last_layer_and_an_unfinished_pass_leaves_no_trace() -> None:
    cache = KeyValueCache(2, 1, 1, 2, 4, dtype=torch.float32, device="cpu")
    ones = torch.ones(1, 1, 3, 2)
    cache.update(0, 7 * ones, 7 * ones)
    assert cache.length == 0
    for layer in range(2):
        keys, values = cache.update(layer, ones, -ones)
        assert torch.equal(keys, ones) and torch.equal(values, -ones)
    assert cache.length == 3
    keys, _ = cache.update(0, 2 * ones, ones)
    assert keys.shape[2] == 6 and torch.equal(keys, torch.cat([ones, 2 * ones], dim=2))


def test_what_does_not_fit_is_refused() -> None:
    cache = KeyValueCache(1, 2, 1, 2, 4, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"keys \(1, 1, 3, 2\).*should be \(2, 1, 3, 2\)"):
        cache.update(0, torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError, match="capacity=0"):
        KeyValueCache(1, 2, 1, 2, 0, dtype=torch.float32, device="cpu")
