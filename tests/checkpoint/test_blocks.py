"""GGUF files whose blocks stay as they are, against the same files as plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

import colrow
from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm import collectives
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from colrow.layers import ggml
from colrow.layers.quantised import QuantisedWeight
from colrow.models.decoder import Decoder
from tests.checkpoint import test_gguf_families, test_loading
from tests.ranks import RankPool

pytestmark = [
    pytest.mark.skipif(ggml.library() is None, reason="libggml-python is not installed"),
    pytest.mark.cpu_only("the kernels are for CPUs"),
]

IDS = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(0))
PROMPT = 15  # more rows than ggml's kernels take
# name: keys of the configuration, the type of all matrices. On several ranks some blocks are cut.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (test_loading.SIZES, "Q4_1"),
    "qwen2": ({**test_loading.SIZES, "tie_word_embeddings": True}, "Q8_0"),
    "qwen3": ({**test_loading.SIZES, "head_dim": 32}, "Q5_0"),
}
GEMMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("blocks")
    found = {}
    for family, (keys, kind) in CASES.items():
        found[family] = root / f"{family}.gguf"
        test_loading.write(found[family], family, keys, gguf.GGMLQuantizationType[kind])
    model = test_gguf_families.make("gemma3", root / "gemma3", **GEMMA)
    found["gemma3"] = test_gguf_families.written(
        "gemma3", model, root / "gemma3", root / "gemma3.gguf", gguf.GGMLQuantizationType.Q4_0
    )
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_blocks_are_the_numbers_that_they_stand_for(
    n: int, files: dict[str, Path], ranks: RankPool
) -> None:
    results = ranks(n, compared, files)
    for name, path in files.items():
        found = [result[name] for result in results]
        assert all(each["exact"] < 1e-12 for each in found), name
        assert all(each["rounded"] < 3e-2 for each in found), name
        assert all(each["flat"] < 3e-2 for each in found), name
        assert all(each["same calls"] and each["kept"] for each in found), name
        stored = [each["bytes"] for each in found]
        assert stored == found[0]["of every rank"], name
        size = path.stat().st_size
        assert sum(stored) < (size if n == 1 else 1.6 * size), name  # both hold a block that is cut


def compared(tp: ParallelGroup, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, path in files.items():
        with torch.no_grad():
            plain = whole(from_pretrained(path, tp, dtype=torch.float64), tp, IDS)
            model = from_pretrained(path, tp, dtype=torch.float64, quantised=True)
            exact = whole(model.for_decoding(), tp, IDS)
            model = from_pretrained(path, tp, quantised=True).for_decoding()
            assert model.one_token is not None
            rounded = whole(model, tp, IDS)
            flat, calls = one_by_one(model, tp)
            model.one_token = None
            by_modules, of_modules = one_by_one(model, tp)
        matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
        held = sum(
            p.stored_bytes if isinstance(p, QuantisedWeight) else p.nbytes
            for p in model.parameters()
        )
        found[name] = {
            "exact": error(exact, plain),
            "rounded": error(rounded, plain),
            "flat": max(error(flat, plain[:1, PROMPT:]), error(flat, by_modules)),
            "same calls": calls == of_modules,
            "kept": all(isinstance(p, QuantisedWeight) for p in matrices.values()),
            "bytes": held,
            "of every rank": model.weight_bytes_per_rank(),
        }
    return found


def whole(model: Decoder, tp: ParallelGroup, ids: Tensor) -> Tensor:
    return collectives.gather_from_tp(model(ids), tp, partition=model.vocab)


def one_by_one(model: Decoder, tp: ParallelGroup) -> tuple[Tensor, list[Any]]:
    """Logits of the tokens behind the prompt, and what was sent for them."""
    cache = model.make_cache(1, 4)  # grows on the way
    model.last_logits(IDS[:1, :PROMPT], attention_mask=None, cache=cache)
    local = []
    with record(tp) as ledger:
        for place in range(PROMPT, IDS.shape[1]):
            given = IDS[:1, place : place + 1]
            local.append(model.last_logits(given, attention_mask=None, cache=cache))
    together = torch.stack(local, 1)
    return collectives.gather_from_tp(together, tp, partition=model.vocab), ledger.calls


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_what_cannot_stay_quantised_is_refused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain.gguf"
    test_loading.write(plain, "llama", test_loading.SIZES, gguf.GGMLQuantizationType.F32)
    with pytest.raises(ValueError, match="no quantised blocks"):
        from_pretrained(plain, quantised=True)
    with pytest.raises(ValueError, match="no kernels for quantised blocks on meta"):
        from_pretrained(files["llama"], quantised=True, device="meta")
    model = from_pretrained(files["llama"], quantised=True)
    with pytest.raises(RuntimeError, match=r"embedding\.weight stays in the blocks.*Q4_1"):
        colrow.full_state_dict(model)
    with pytest.raises(RuntimeError, match="stays in the blocks"):
        model.loss(IDS, IDS)
    with torch.no_grad():
        assert model.loss(IDS, IDS).isfinite()
    monkeypatch.setattr(ggml, "library", lambda: None)
    with pytest.raises(ValueError, match=r"pip install 'colrow\[quantised\]'"):
        from_pretrained(files["llama"], quantised=True)
