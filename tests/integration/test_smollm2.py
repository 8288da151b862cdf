"""A real model, three ways: transformers' own class whole, split in place, and the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.differences import relative_error
from colrow.mesh import Mesh, ParallelGroup
from colrow.reference import load_reference, precision
from tests.ranks import RankPool


def mesh_of(tp: ParallelGroup) -> Mesh:
    single = ParallelGroup.single
    return Mesh(tp, single("dp"), single("pp"), None, torch.device("cpu"))


def three_ways(tp: ParallelGroup, path: Path) -> dict[str, Any]:
    ids = torch.randint(3, 49_000, (1, 12), generator=torch.Generator().manual_seed(0))
    model: Any = load_reference(path, torch.float64)
    elements = sum(p.numel() for p in model.parameters())
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), precision(torch.float64):
        whole = model(ids).logits
        tokens = model.generate(ids, **greedy)
    model = colrow.parallelize(model, mesh_of(tp))
    with torch.no_grad(), precision(torch.float64):
        split = model(ids).logits
        split_tokens = model.generate(ids, **greedy)
    held = sum(p.numel() for p in model.parameters())
    del model
    decoder = colrow.from_pretrained(path, mesh_of(tp), dtype=torch.float64)
    with torch.no_grad():
        local = decoder(ids)
    decoded = colrow.gather_from_tp(local, tp, partition=decoder.layout.vocab)
    return {
        "in place": relative_error(split, whole),
        "decoder": relative_error(decoded, split),
        "tokens": torch.equal(tokens, split_tokens),
        "held": held / elements,
    }


@pytest.mark.slow
def test_smollm2_in_place_is_the_whole_model_and_the_decoder(
    ranks: RankPool, smollm2: Path
) -> None:
    for result in ranks(2, three_ways, smollm2, timeout=600):
        assert result["in place"] < 1e-12
        assert result["decoder"] < 1e-12
        assert result["tokens"]
        assert result["held"] < 0.52
