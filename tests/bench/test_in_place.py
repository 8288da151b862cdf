"""Measuring models of transformers that are split in place: what is counted is what they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colrow.bench.result import BenchSettings
from colrow.cli import main
from tests.bench.test_bench import calls, measured
from tests.ranks import RankPool

CONFIG = {
    "model_type": "granite",
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


def settings(model: str, what: str, *, decode: bool = False) -> BenchSettings:
    return BenchSettings(None, what, 2, 8, decode, runs=1, warmup=1, in_place=model)


def test_what_a_block_and_its_modules_do(ranks: RankPool, model: str) -> None:
    """Seven matmuls forward, twice as many backward; an all-reduce a half and direction."""
    expected = {"attention": (4, 1), "mlp": (3, 1), "block": (7, 2)}
    for what, (matmuls, reductions) in expected.items():
        (found,) = ranks(2, measured, settings(model, what), timeout=300)[0]
        phases = calls(found)
        assert phases["forward"]["matmul"] == matmuls and found.subject == what
        assert phases["backward"]["matmul"] == 2 * matmuls
        assert phases["forward"]["all_reduce"] == phases["backward"]["all_reduce"] == reductions
        assert phases["forward"].get("attention", 0) == (what != "mlp")


@pytest.mark.parametrize("decode", [False, True])
def test_the_whole_model(ranks: RankPool, model: str, decode: bool) -> None:
    (found,) = ranks(2, measured, settings(model, "model", decode=decode), timeout=300)[0]
    phases = calls(found)
    assert list(phases) == (["prompt", "token"] if decode else ["forward", "backward", "optimizer"])
    for phase in ("prompt", "token") if decode else ("forward",):
        assert phases[phase]["matmul"] == 2 * 7 + 1  # and the head


def test_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    options = ["--in-place", "--tp", "1", "--sequence", "8", "--runs", "1"]
    assert main(["bench", model, "--what", "mlp", *options, "--json", str(out)]) == 0
    assert "granite: transformers' model, split in place" in capsys.readouterr().err
    assert json.loads(out.read_text())["measurements"][0]["subject"] == "mlp"
    for more, message in (
        (["--what", "layer"], "has no one module for it, but self_attn, mlp, input_layernorm"),
        (["--what", "mlp", "--decode"], "use --what model with --decode"),
        (["--tensor-split", "2,1"], "a tensor split: for the described families only"),
        (["--pp", "2"], "a pipeline of 2 stages: for the described families only"),
    ):
        assert main(["bench", model, *options, *more]) == 2
        assert message in capsys.readouterr().err
