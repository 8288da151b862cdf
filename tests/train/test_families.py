"""Every family of the decoder, trained from layout to layout, against transformers and torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colrow.tiny_models.architectures import Architecture, build
from colrow.verification.reference import quiet_transformers
from tests.ranks import RankPool
from tests.train.runs import assert_same, curve, expected, make_settings

FAMILIES = ["phi3", "olmo2", "gemma3_text", "mixtral", "gemma2", "cohere", "falcon", "smollm3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_curve_is_transformers_across_a_reshard(
    ranks: RankPool, tokens: Path, tmp_path: Path, name: str
) -> None:
    """Two steps on 2 ranks, two in a pipeline of 2 stages, two on 3 with sequence parallelism."""
    with quiet_transformers():
        model = build(Architecture(name, fields=(("vocab_size", 257),)))
        model.save_pretrained(tmp_path / name)
    layouts = ({"tp": 2}, {"pp": 2, "microbatch": 2}, {"tp": 3, "sequence_parallel": True})
    found = []
    for first, layout in zip((0, 2, 4), layouts, strict=True):
        settings = make_settings(tmp_path / name, **{"microbatch": 4, **layout})
        saved = tmp_path / "run"
        found += ranks(
            settings.ranks, curve, settings, tokens, first, first + 2, saved, timeout=300
        )[-1]
    assert_same(found, expected(tmp_path / name, tokens))


def test_losses_of_routers(ranks: RankPool, tokens: Path, tmp_path: Path) -> None:
    """Against transformers' own, and the same however microbatches are divided over ranks."""
    with quiet_transformers():
        model = build(Architecture("mixtral", fields=(("vocab_size", 257),)))
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
        model.save_pretrained(tmp_path)

    def run(size: int, **options: Any) -> list[tuple[float, float]]:
        settings = make_settings(tmp_path, **options)
        found: list[tuple[float, float]] = ranks(size, curve, settings, tokens, 0, 3)[0]
        return found

    one = run(2, tp=2, microbatch=8, sequence_parallel=True, recompute="full")
    assert_same(one, expected(tmp_path, tokens)[:3])
    halves = run(1, microbatch=4)
    assert_same(run(2, dp=2, microbatch=4, fsdp=True), halves)
    assert run(1, microbatch=8, router_balance=0.0)[0][0] < one[0][0] - 0.1
    with pytest.raises(AssertionError, match="a pipeline stage has some of them"):
        run(2, pp=2, microbatch=4)
