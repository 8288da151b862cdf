"""Real quantised files, divided: against transformers' unsplit models, and each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.generation.generate import generate
from colrow.layers import ggml
from colrow.verification.quantised import verify_quantised
from tests.ranks import RankPool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ggml.library() is None, reason="libggml-python is not installed"),
    pytest.mark.cpu_only("the kernels are for CPUs"),
]


@pytest.fixture(params=["smollm2", "gemma3"])
def file(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Path:
    """SmolLM2 as Q4_1 with Q8_0; Gemma 3 270M as Q4_K_M: Q4_K, Q5_0, Q6_K and Q8_0."""
    if request.param == "smollm2":
        found: Path = request.getfixturevalue("smollm2")
        return found
    path = pytestconfig.rootpath / ".cache/gemma3/gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip(f"{path} is missing; make test-slow fetches it")
    return path


@pytest.mark.parametrize("n", [2, 3])
def test_divided_blocks_are_the_whole_model(n: int, ranks: RankPool, file: Path) -> None:
    report = ranks(n, verified, file, timeout=600)[0]
    assert report is not None and report.passed, report
    size = file.stat().st_size
    # On three ranks an FFN of 2048 cuts blocks of 256, which two ranks then hold.
    assert 0.9 * size < sum(report.weight_bytes_per_rank) < 1.1 * size


def verified(tp: ParallelGroup, file: Path) -> Any:
    alone = ParallelGroup.single
    mesh = Mesh(tp, alone("dp"), alone("pp"), None, torch.device("cpu"))
    return verify_quantised(file, mesh, dtype=torch.float64, new_tokens=8)


def test_tokens_are_the_same_on_all_numbers_of_ranks(ranks: RankPool, file: Path) -> None:
    tokens = [ranks(n, continued, file, timeout=300)[0] for n in (1, 2, 3)]
    assert tokens[0] == tokens[1] == tokens[2]


def continued(tp: ParallelGroup, file: Path) -> list[int]:
    model = from_pretrained(file, tp, quantised=True).for_decoding()
    assert model.one_token is not None
    prompt = torch.arange(900, 910)[None]
    return generate(model, prompt, max_new_tokens=12).token_ids[0]
