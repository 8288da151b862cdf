from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from colrow.generation.generate import Generation, generate
from colrow.generation.sampling_settings import Sampling
from tests.generation import models
from tests.models import tiny
from tests.ranks import RankError, RankPool

NEW = 16


@dataclass(frozen=True)
class Case:
    path: str
    model: Any  # transformers'
    expected: list[list[int]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Checkpoints of every family, and transformers' greedy answers to the three prompts."""
    root = tmp_path_factory.mktemp("generate")
    found = {}
    for name in tiny.CASES:
        model = models.save(name, root / name)
        expected = models.reference(model, *models.prompts(), NEW).tolist()
        assert max(len(set(row)) for row in expected) > 5, f"{name} only repeats itself"
        found[name] = Case(str(root / name), model, expected)
    return found


def run(tp: ParallelGroup, path: str, ids: Tensor, **options: Any) -> Generation:
    return generate(from_pretrained(path, tp, dtype=torch.float64), ids, **options)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_greedy_tokens_are_those_of_transformers(
    n: int, cases: dict[str, Case], ranks: RankPool
) -> None:
    # A model built for sequence parallelism decodes with the whole sequence on every rank.
    names = tiny.at(n)
    paths = [(cases[name].path, index % 2 == 1) for index, name in enumerate(names)]
    for results in ranks(n, greedy, paths, timeout=120):
        for name, result in zip(names, results, strict=True):
            case = cases[name]
            assert result.token_ids == case.expected, name
            assert result.tokens.tolist() == case.expected
            assert result.finished == [False] * 3


def greedy(tp: ParallelGroup, paths: list[tuple[str, bool]]) -> list[Generation]:
    ids, mask = models.prompts()
    return [
        generate(
            from_pretrained(path, tp, dtype=torch.float64, sequence_parallel=sequence_parallel),
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
        )
        for path, sequence_parallel in paths
    ]


def test_rows_end_at_their_end_of_sequence_token(cases: dict[str, Case], ranks: RankPool) -> None:
    case = cases["qwen2"]
    ids, mask, free = *models.prompts(), case.expected
    ends = [free[0][4], free[1][9], free[2][14]]
    expected = models.reference(case.model, ids, mask, NEW, eos=ends)
    for result in ranks(2, until, case.path, ends):
        assert result.tokens.tolist() == expected.tolist()
        assert result.tokens.shape[1] < NEW
        assert result.finished == [True] * 3
        for row, tokens in enumerate(result.token_ids):
            first = min(free[row].index(end) for end in ends if end in free[row])
            assert tokens == free[row][: first + 1]


def until(tp: ParallelGroup, path: str, ends: list[int]) -> Generation:
    ids, mask = models.prompts()
    return run(
        tp, path, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_ids=ends, pad_token_id=0
    )


def test_sampled_tokens_do_not_depend_on_the_number_of_ranks(
    cases: dict[str, Case], ranks: RankPool
) -> None:
    path = cases["qwen2"].path
    results = [result for n in (1, 2, 3, 4) for result in ranks(n, sampled, path, 5)]
    assert all(result == results[0] for result in results)
    assert ranks(1, sampled, path, 6)[0] != results[0]


def sampled(tp: ParallelGroup, path: str, seed: int) -> list[list[int]]:
    ids, mask = models.prompts()
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=seed)
    return run(tp, path, ids, attention_mask=mask, max_new_tokens=12, sampling=sampling).token_ids


def test_collectives_callback_and_no_dropout(cases: dict[str, Case], ranks: RankPool) -> None:
    case = cases["gpt2"]
    for calls, heard, was_training in ranks(2, watched, case.path):
        assert heard == [[row[step] for row in case.expected] for step in range(3)]
        assert was_training
        layers = ["embedding"]
        for block in ("blocks.0", "blocks.1"):
            layers += [f"{block}.attention.output", f"{block}.mlp.down"]
        assert calls == ["inputs"] + [*layers, "sampling"] * 3


def watched(tp: ParallelGroup, path: str) -> tuple[list[str], list[list[int]], bool]:
    model = from_pretrained(path, tp, dtype=torch.float64).train()
    heard: list[list[int]] = []
    ids, mask = models.prompts()
    with record(tp) as ledger:
        generate(model, ids, attention_mask=mask, max_new_tokens=3, on_tokens=heard.append)
    return [call.layer for call in ledger.calls], heard, model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1 is needed"),
        ({"max_new_tokens": 60}, "set max_new_tokens to at most 55"),
        ({"attention_mask": torch.ones(1, 8)}, r"attention_mask should be \(1, 9\)"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "pad on the left"),
        ({"input_ids": torch.ones(9, dtype=torch.long)}, r"should be \[batch, sequence\]"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, cases: dict[str, Case]) -> None:
    model = from_pretrained(cases["gpt2"].path)
    arguments = {"input_ids": models.prompts()[0][:1], "max_new_tokens": 1, **change}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_ranks_with_different_prompts_are_refused(cases: dict[str, Case], ranks: RankPool) -> None:
    for what in ("prompt", "sampling"):
        with pytest.raises(RankError) as caught:
            ranks(2, differ, cases["qwen2"].path, what)
        assert sorted(caught.value.errors) == [0, 1]
        assert "were given different batches" in caught.value.errors[0]


def differ(tp: ParallelGroup, path: str, what: str) -> None:
    ids = models.prompts()[0][:1]
    seed = tp.rank if what == "sampling" else 0
    if what == "prompt":
        ids = ids + tp.rank
    run(tp, path, ids, max_new_tokens=2, sampling=Sampling(temperature=1.0, seed=seed))


@pytest.mark.cpu_only("weights are laid out for CPUs")
def test_weights_laid_out_for_decoding(cases: dict[str, Case], ranks: RankPool) -> None:
    for results in ranks(2, laid_out, [cases["qwen2"].path, cases["bloom"].path]):
        for same_weights, shift, kernels, tokens in results:
            assert same_weights
            assert shift[torch.float64] < 1e-12 and shift[torch.bfloat16] < 2e-2
            assert kernels[torch.float64] == {"BlasKernel" if openblas() else "NoneType"}
            packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
            assert kernels[torch.bfloat16] == {"PackedKernel" if packs else "NoneType"}
            assert tokens


def openblas() -> bool:
    built: Any = np.show_config(mode="dicts")
    return "openblas" in built["Build Dependencies"]["blas"]["name"]


def laid_out(tp: ParallelGroup, paths: list[str]) -> list[tuple[bool, Any, Any, bool]]:
    return [laid_out_one(tp, path) for path in paths]


def laid_out_one(tp: ParallelGroup, path: str) -> tuple[bool, Any, Any, bool]:
    """Weights and logits against those of the plain layout; packed copies follow their weights."""
    ids, mask = models.prompts()
    shift, kernels, same, tokens = {}, {}, True, []
    for dtype in (torch.float64, torch.bfloat16):
        model = from_pretrained(path, tp, dtype=dtype)
        before = {name: p.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            plain = model(ids)
            laid = model.for_decoding()(ids)
        shift[dtype] = ((laid - plain).norm() / plain.norm()).item()
        layers = [module for module in model.modules() if hasattr(module, "kernel")]
        kernels[dtype] = {type(layer.kernel).__name__ for layer in layers}
        same &= all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        tokens.append(generate(model, ids, attention_mask=mask, max_new_tokens=8).token_ids)
        same &= not any(p.requires_grad for p in model.parameters())
        with torch.no_grad():  # no copy is read once its weight has changed
            for parameter in model.parameters():
                parameter.mul_(1.5)
            changed = model(ids)
            again = model.for_decoding()(ids)
        same &= bool((changed - again).norm() <= 2e-2 * again.norm())
    expected = run(tp, path, ids, attention_mask=mask, max_new_tokens=8).token_ids
    return same, shift, kernels, tokens[0] == expected
