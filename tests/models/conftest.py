from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import tiny


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every tiny model and what transformers computes for it."""
    root = tmp_path_factory.mktemp("tiny")
    ids = batch()
    for name in tiny.CASES:
        model = tiny.make(name, root / name)
        for dtype in (torch.float64, torch.float32):
            expected = tiny.evaluate(model, ids, dtype)
            torch.save(vars(expected), root / f"{name}-{dtype}.pt")
    return root


def batch() -> torch.Tensor:
    """Three rows of 17 tokens: neither divides by 2 or 4."""
    return torch.randint(0, 97, (3, 17), generator=torch.Generator().manual_seed(1))
