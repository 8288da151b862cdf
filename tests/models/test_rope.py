"""Rotary positions of every kind, against transformers' own; also in texts that outgrow them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from colrow import from_pretrained
from colrow.checkpoint.export_config import config_to_hf
from colrow.comm.collectives import gather_from_tp
from colrow.comm.group import ParallelGroup
from colrow.generation.generate import generate
from colrow.layers.position import rope_frequencies
from colrow.models.compose import fields_of
from colrow.models.hf_config import config_from_hf
from colrow.verification.comparison import relative_error
from colrow.verification.reference import cached_step, precision
from tests.generation import models
from tests.models import tiny
from tests.ranks import RankPool

ORIGINAL, LONGER = 16, 23
LONG = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 1.5, 4.0, 9.0]}
# Sizes for which the ramp begins and ends between pairs of dimensions.
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "original_max_position_embeddings": 4096}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3},
    "llama3": tiny.LLAMA3_ROPE,
    "yarn": {**YARN, "factor": 4.0},
    "yarn with scales": {**YARN, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn with ends": {**YARN, "factor": 2.5, "beta_fast": 3.0, "beta_slow": 0.5},
    "yarn untruncated": {**YARN, "factor": 4.0, "truncate": False, "attention_factor": 1.7},
    "yarn by lengths": {**YARN, "factor": None, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"rope_type": "longrope", **LONG},
    "longrope with a factor": {"rope_type": "longrope", **LONG, "factor": 5.0},
    "longrope, given": {"rope_type": "longrope", **LONG, "attention_factor": 1.2},
}


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    table = {"rope_theta": 5000.0, **KINDS[name]}
    values = {
        **tiny.SMALLEST,
        "head_dim": 8,
        "max_position_embeddings": 2 * ORIGINAL,
        "rope_parameters": table,
    }
    if "longrope" in name:
        values["original_max_position_embeddings"] = ORIGINAL
    config = config_from_hf(values)
    theirs: Any = AutoConfig.for_model(**values)
    rope = fields_of(config)["rope"]
    assert config_from_hf(config_to_hf(config)) == config
    if name == "default":
        return
    for length in (None, 3 * ORIGINAL):
        given = None if length is None else torch.tensor(length)
        expected, factor = ROPE_INIT_FUNCTIONS[table["rope_type"]](theirs, "cpu", seq_len=given)
        assert rope.attention_factor == factor
        assert torch.equal(rope_frequencies(rope, length=length or 0), expected)


CASES = {
    "phi4": {"original_max_position_embeddings": ORIGINAL},
    "falcon-new": {"max_position_embeddings": ORIGINAL},
}


@pytest.mark.parametrize("name", CASES)
def test_texts_that_outgrow_the_original_positions(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whole, and token by token with what was cached while the text was short."""
    kind, keys = tiny.CASES[name]
    monkeypatch.setitem(tiny.CASES, name, (kind, {**keys, **CASES[name]}))
    model: Any = models.save(name, tmp_path)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, tiny.SIZES["vocab_size"], (2, LONGER), generator=generator)
    for each in ("dynamic", "longrope"):
        monkeypatch.setitem(ROPE_INIT_FUNCTIONS, each, in_fp32(ROPE_INIT_FUNCTIONS[each]))
    with torch.no_grad(), precision(torch.float64):
        whole, one_by_one, cache = model(ids).logits, [], None
        for position in range(LONGER):
            logits, cache = cached_step(model, ids[:, position : position + 1], cache)
            one_by_one.append(logits)
    steps = torch.cat(one_by_one, dim=1)
    expected = models.reference(model, ids[:, :9], torch.ones(2, 9), LONGER - 9).tolist()
    for logits, cached, answer in ranks(2, long_texts, str(tmp_path), ids):
        assert relative_error(logits, whole) < 1e-12
        assert relative_error(cached, steps) < 1e-12
        assert answer == expected


def in_fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the frequencies are that transformers computes when it makes a model."""

    def compute(*args: Any, **options: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **options)

    return compute


@torch.no_grad()
def long_texts(tp: ParallelGroup, path: str, ids: Tensor) -> tuple[Tensor, Tensor, list[list[int]]]:
    model = from_pretrained(path, tp, dtype=torch.float64)
    whole = gather_from_tp(model(ids), tp, partition=model.vocab)
    cache, steps = model.make_cache(2, LONGER), []
    for position in range(LONGER):
        token = ids[:, position : position + 1]
        steps.append(gather_from_tp(model(token, cache=cache), tp, partition=model.vocab))
    answer = generate(model, ids[:, :9], max_new_tokens=LONGER - 9)
    return whole, torch.cat(steps, dim=1), answer.token_ids
