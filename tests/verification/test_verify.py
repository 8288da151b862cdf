"""``verify`` finds nothing where nothing is wrong, and names what is."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from colrow import rng
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.models.decoder import Decoder
from colrow.models.hf_config import config_from_hf
from colrow.verification.comparison import relative_error
from colrow.verification.differences import (
    BatchResult,
    first_difference,
    why_not_finite,
    worst_gradients,
)
from colrow.verification.verify import Report, accepted, as_likely, verify
from tests.models import tiny
from tests.ranks import RankPool, child_ranks


def run(
    tp: ParallelGroup, path: Path, dtype: torch.dtype, sequence_parallel: bool, harm: str
) -> Report | None:
    """Verifies on the pool's ranks; ``harm`` is a parameter that rank 1 gets slightly wrong."""

    def perturb(model: Decoder) -> None:
        if harm and tp.rank == 1:
            with torch.no_grad():
                weight = dict(model.named_parameters())[harm]
                weight.view(-1)[0] += 0.1 * weight.norm()

    return verify(
        path,
        one_tp(tp),
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        new_tokens=8,
        prepare=perturb,
    )


def one_tp(tp: ParallelGroup) -> Mesh:
    single = ParallelGroup.single
    return Mesh(tp, single("dp"), single("pp"), None, torch.get_default_device())


@pytest.mark.parametrize("name", tiny.at(2))
def test_every_family_passes(ranks: RankPool, tiny_models: Path, name: str) -> None:
    report = ranks(2, run, tiny_models / name, torch.float64, True, "")[0]
    assert report.passed, report
    assert report.first_difference is None
    assert set(report.gradient_errors) == set(
        torch.load(tiny_models / f"{name}-torch.float64.pt", weights_only=True)["grads"]
    )
    assert max(report.gradient_errors.values()) < 1e-12
    assert report.tp == 2 and report.sequence_parallel and report.dtype == "float64"


@pytest.mark.parametrize(
    ("harm", "layer", "weight"),
    [
        ("blocks.1.mlp.down.weight", "model.layers.1", "mlp.down_proj.weight"),
        ("blocks.0.attention.qkv.weight", "model.layers.0", "self_attn.q_proj.weight"),
        ("embedding.weight", "model.embed_tokens", "weight"),
        ("head.weight", "lm_head", "weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_wrong_weight_of_one_rank_is_named(
    ranks: RankPool, tiny_models: Path, harm: str, layer: str, weight: str, dtype: torch.dtype
) -> None:
    report = ranks(2, run, tiny_models / "llama", dtype, False, harm)[0]
    assert not report.passed
    assert report.logits_error > 1e-5
    assert report.first_difference == f"{layer} (its weights differ: {layer}.{weight})"


def test_a_wrong_row_of_a_tied_embedding_is_named(ranks: RankPool, tiny_models: Path) -> None:
    """The row belongs to a token that the batch does not contain: only the head sees it."""
    report = ranks(2, run_tied, tiny_models / "gpt2")[0]
    assert not report.passed
    assert report.first_difference == (
        "lm_head, tied to transformer.wte (its weights differ: transformer.wte.weight)"
    )


def run_tied(tp: ParallelGroup, path: Path) -> Report | None:
    def perturb(model: Decoder) -> None:
        if tp.rank == 1:
            ids = rng.bits(rng.stream_key(0, "verify"), torch.arange(62)).remainder(97)
            held = range(*model.vocab.bounds[1])
            unused = next(token for token in held if token not in ids)
            with torch.no_grad():
                model.embedding.weight[unused - held.start] += 1.0

    return verify(path, one_tp(tp), dtype=torch.float64, new_tokens=2, prepare=perturb)


def test_what_differs_is_named_to_the_end() -> None:
    """Weights where no output shows them, gradients where no weight differs."""
    kind, keys = tiny.CASES["llama"]
    config = config_from_hf({"model_type": kind, **keys, "max_position_embeddings": 64})
    reference = nn.ModuleDict({"w": nn.Linear(2, 2, bias=False)})
    layers = {name: torch.ones(2) for name in ("embedding", "blocks.0", "blocks.1", "norm", "head")}
    weights = {"w.weight": reference["w"].weight.detach().clone()}
    arguments = (config, layers, layers, weights, reference, 1e-6)
    assert first_difference(*arguments) is None
    with torch.no_grad():
        reference["w"].weight[0] = weights["w.weight"][0] = math.nan  # damaged in the file already
    assert first_difference(*arguments) is None
    weights["w.weight"] += 1
    assert first_difference(*arguments) == "no layer's output, but weights: w.weight"
    assert worst_gradients({}) is None
    worse = dict.fromkeys("abcd", 1.0) | {"c": 2.0}
    assert worst_gradients(worse) == (
        "no layer's output or weights, but gradients: c, a, b and 1 more"
    )


def test_an_overflow_of_the_unsplit_model_accepts_nothing() -> None:
    assert accepted(1e-5, 1e-4) == 2e-4 and accepted(1e-5, 1e-7) == 1e-5
    assert accepted(2e-2, math.inf) == accepted(2e-2, math.nan) == 2e-2


def test_numbers_that_are_not_finite_are_blamed_on_somebody() -> None:
    weights = {"w": torch.ones(2)}

    def result(value: float) -> BatchResult:
        return BatchResult(torch.ones(2), torch.tensor(value), {"w": torch.tensor([1.0, value])})

    good, bad, half = result(1.0), result(math.nan), torch.float16
    assert why_not_finite(good, good, good, weights, half) is None
    for split, rounded, exact, message in (
        (bad, bad, bad, "loss, gradients not finite in the unsplit model, even in fp64"),
        (bad, bad, good, "in float16, split or not: the model overflows it; use bf16 or fp32"),
        (bad, good, good, "in the split model, unlike the unsplit one"),
        (bad, None, good, "in the split model, unlike the unsplit one"),
        (good, bad, good, "what rounding costs is unknown"),
    ):
        assert message in str(why_not_finite(split, rounded, exact, weights, half))
    weights["w"][1] = math.inf
    assert "NaN or Inf is in w" in str(why_not_finite(bad, good, good, weights, half))


def test_a_weight_that_is_not_a_number_fails(ranks: RankPool, tiny_models: Path) -> None:
    report = ranks(2, run_nan, tiny_models / "llama")[0]
    name = "model.layers.1.mlp.down_proj.weight"
    assert not report.passed and not report.greedy_tokens
    assert report.first_difference == f"model.layers.1 (its weights differ: {name})"
    assert report.not_finite.endswith(f"unlike the unsplit one: NaN or Inf is in {name}")


def run_nan(tp: ParallelGroup, path: Path) -> Report | None:
    def perturb(model: Decoder) -> None:
        if tp.rank == 1:
            with torch.no_grad():
                dict(model.named_parameters())["blocks.1.mlp.down.weight"].view(-1)[0] = math.nan

    return verify(path, one_tp(tp), prepare=perturb)


class Successor(nn.Module):
    """After token t the best is t + 1, and t + 2 is worse by a tenth."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        better, worse = (nn.functional.one_hot((input_ids + i) % 9, 9) for i in (1, 2))
        return SimpleNamespace(logits=better + 0.9 * worse)


@pytest.mark.parametrize(
    ("tokens", "right"),
    [([3, 4, 5], True), ([4, 5, 7], True), ([4, 5, 8], False), ([4, 4, 5], False)],
)
def test_every_token_after_a_tie_is_checked(tokens: list[int], right: bool) -> None:
    prompt = torch.tensor([[1, 2]])
    assert as_likely(Successor(), prompt, tokens, 0.2) == right
    assert as_likely(Successor(), prompt, tokens, 0.01) == (tokens == [3, 4, 5])


def test_sixteen_bits_pass_within_their_rounding(ranks: RankPool, tiny_models: Path) -> None:
    report = ranks(3, run, tiny_models / "qwen2", torch.bfloat16, True, "")[0]
    assert report.passed, report
    assert report.rounding.gradients > 0
    assert report.logits_error > 1e-4
    limits = report.gradient_tolerances.values()  # each tensor's own rounding, not the worst one's
    assert min(limits) >= 2e-2 and len(set(limits)) > 2, limits


@pytest.mark.parametrize(
    ("size", "dtype", "sequence_parallel", "sequence"),
    [
        (2, "fp32", False, 31),
        (3, "fp64", True, 7),
        *(
            pytest.param(size, dtype, sequence_parallel, 31, marks=pytest.mark.slow)
            for size in (2, 3)
            for dtype in ("fp32", "fp64")
            for sequence_parallel in (False, True)
            if (size, dtype, sequence_parallel) != (2, "fp32", False)
        ),
    ],
)
def test_a_real_model_passes(
    smollm2: Path, tmp_path: Path, size: int, dtype: str, sequence_parallel: bool, sequence: int
) -> None:
    """SmolLM2 has 9 query and 3 KV heads, and 272 parameter tensors, all of them compared."""
    out = tmp_path / "report.json"
    arguments = ["verify", str(smollm2), "--tp", str(size), "--dtype", dtype, "--json", str(out)]
    arguments += ["--sequence", str(sequence), *["--sequence-parallel"] * sequence_parallel]
    code = main(arguments)
    report = json.loads(out.read_text())
    assert code == 0
    assert report["passed"] and report["greedy_equal"] and report["first_difference"] is None
    assert report["tp"] == size
    assert len(report["gradient_errors"]) == 272
    assert max(report["gradient_tolerances"].values()) < (1e-4 if dtype == "fp32" else 1.1e-12)
    for name, error in report["gradient_errors"].items():
        assert error <= report["gradient_tolerances"][name], name
    assert report["logits_error"] < (1e-12 if dtype == "fp64" else 1e-5)
    assert report["loss_error"] < (1e-12 if dtype == "fp64" else 1e-6)
    heads = {2: [[5, 2], [4, 2]], 3: [[3, 1]] * 3}
    assert report["heads_per_rank"] == heads[size]


def test_failing_ends_with_one(tiny_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_models / "llama"), "--tp", "1"]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert main(["verify", str(tiny_models / "llama"), "--tp", "6"]) == 2
    assert "5 query heads cannot be split over 6 ranks" in capsys.readouterr().err
    assert main(["verify", "nowhere", "--tp", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["verify", str(tiny_models / "llama"), "--sequence", "99999"]) == 2
    assert "--sequence 99999 is longer than the model's context" in capsys.readouterr().err


def test_relative_error() -> None:
    one = torch.ones(4)
    assert relative_error(one, one) == 0
    assert relative_error(one * 1.5, one) == 0.5
    assert relative_error(one, torch.zeros(4)) == 2
    assert relative_error(one, torch.ones(3)) == float("inf")
    assert relative_error(one * float("nan"), one) == float("inf")
    masked = torch.tensor([1.0, -float("inf")])
    assert relative_error(masked, masked) == float("inf")
    assert relative_error(masked, masked, masked=True) == 0
    assert relative_error(masked * 2, masked, masked=True) == 1
    for other in (-1, float("nan")):
        assert relative_error(masked * other, masked, masked=True) == float("inf")
    assert relative_error(one * 0.25, torch.zeros(4), smallest=2) == 0.25


def test_a_killed_rank_ends_the_command(smollm2: Path) -> None:
    command = [sys.executable, "-m", "colrow.cli", "verify", str(smollm2), "--tp", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        while "forward and backward" not in (line := process.stderr.readline()):
            lines.append(line)
            assert line, "it ended by itself"
        os.kill(child_ranks(process.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - killed < 20
    assert process.returncode == 1
    assert "colrow verify: rank 1 was killed by SIGKILL" in errors
