"""Architectures that colrow does not describe, split in place, against transformers' own tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.any_model.loading import describe_model, load_model
from colrow.any_model.padding import architecture_takes_padding
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from colrow.comm.mesh import Mesh
from colrow.generation.generate import generate
from colrow.generation.sampling_settings import Sampling
from colrow.inplace.weights.meta import model_of
from colrow.tiny_models.architectures import Architecture, build
from colrow.verification.reference import full_precision
from tests.generation import models
from tests.ranks import RankPool

pytestmark = pytest.mark.cpu_only("tiny models of transformers in fp64, on the CPU")

NEW = 8
# Softcapped logits, experts, a state instead of keys and values, learned positions, one KV head,
# a cache of latents.
NAMES = ("gemma2", "mixtral", "mamba", "opt", "falcon", "deepseek_v3")


@dataclass(frozen=True)
class Case:
    path: str
    expected: list[list[int]]


def case(name: str, directory: Path) -> Case:
    """A saved model, and what transformers makes of each prompt alone."""
    model: Any = build(Architecture(name)).eval()
    model.save_pretrained(directory)
    expected = []
    with full_precision():
        for ids, mask in zip(*models.prompts(), strict=True):
            prompt = ids[mask.bool()].view(1, -1)
            valid = torch.ones_like(prompt)
            expected += models.reference(model, prompt, valid, NEW).tolist()
    return Case(str(directory), expected)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("any")
    return {name: case(name, root / name) for name in NAMES}


def mesh_of(tp: ParallelGroup) -> Mesh:
    single = ParallelGroup.single
    return Mesh(tp, single("dp"), single("pp"), None, torch.device("cpu"))


def answers(
    tp: ParallelGroup, path: str, dtype: torch.dtype, sampling: Sampling
) -> tuple[list[list[int]], bool]:
    """The tokens, and whether the rows shared a batch."""
    ids, mask = models.prompts()
    model = load_model(path, mesh_of(tp), dtype=dtype, in_place=True).for_decoding()
    with full_precision() if dtype == torch.float64 else torch.no_grad():
        assert model.description.kind == "in place"
        result = generate(model, ids, attention_mask=mask, max_new_tokens=NEW, sampling=sampling)
    return result.token_ids, model.takes_padding


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_gets_the_tokens_of_transformers(
    name: str, n: int, cases: dict[str, Case], ranks: RankPool
) -> None:
    found = ranks(n, answers, cases[name].path, torch.float64, Sampling(), timeout=240)
    assert found == [(cases[name].expected, True)] * n


def test_in_fp32_too(cases: dict[str, Case], ranks: RankPool) -> None:
    path = cases["gemma2"].path
    found = ranks(2, answers, path, torch.float32, Sampling(), timeout=240)
    assert found[0][0] == cases["gemma2"].expected


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma"])
def test_rows_come_one_by_one_where_padding_changes_them(
    name: str, tmp_path: Path, ranks: RankPool
) -> None:
    """Their states take up padding as they do tokens; RecurrentGemma's is in its modules."""
    recurrent = case(name, tmp_path)
    found = ranks(2, answers, recurrent.path, torch.float64, Sampling(), timeout=240)
    assert found == [(recurrent.expected, False)] * 2


def test_limits_of_an_architecture_show_on_a_tiny_model() -> None:
    """DeepSeek V3.2 looks at the best few tokens, among which padding may be."""
    assert architecture_takes_padding("llama")
    assert not architecture_takes_padding("deepseek_v32")
    assert not architecture_takes_padding("nobody's")


def test_draws_are_the_same_at_every_size(cases: dict[str, Case], ranks: RankPool) -> None:
    sampling = Sampling(temperature=1.5, top_k=20, seed=3)
    path = cases["gemma2"].path
    found = [ranks(n, answers, path, torch.float64, sampling, timeout=240)[0][0] for n in (1, 2, 3)]
    assert found[0] == found[1] == found[2] != cases["gemma2"].expected


def one_step(tp: ParallelGroup, path: str) -> tuple[tuple[int, ...], list[tuple[str, int]]]:
    """How the vocabulary is divided, and what one more token sends."""
    model = load_model(path, mesh_of(tp), dtype=torch.float32, in_place=True).for_decoding()
    cache = model.make_cache(1, 9)
    prompt: Tensor = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        model.last_logits(prompt, attention_mask=None, cache=cache)
        with record(tp) as ledger:
            logits = model.last_logits(prompt[:, :1], attention_mask=None, cache=cache)
    assert logits.shape == (1, model.vocabulary.size(tp.rank))
    assert cache.length == 4 and cache.bytes > 0
    return model.vocabulary.sizes, [(call.op, call.bytes) for call in ledger.calls]


def test_no_rank_has_all_logits(cases: dict[str, Case], ranks: RankPool) -> None:
    sizes, calls = ranks(2, one_step, cases["gemma2"].path, timeout=240)[0]
    assert sizes == (49, 48)
    hidden = json.loads((Path(cases["gemma2"].path) / "config.json").read_text())["hidden_size"]
    assert set(calls) == {("all_reduce", 4 * hidden)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pp", "2"], "a pipeline of 2 stages: for the described families only"),
        (["--tp", "2", "--tensor-split", "2,1"], "this opt is split in place, over equal"),
        (["--layer-split", "1"], "a layer split: for the described families only"),
    ],
)
def test_what_is_not_possible_in_place_is_one_line(
    options: list[str],
    message: str,
    cases: dict[str, Case],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", cases["opt"].path, "Hi", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model: Any = build(Architecture("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(OWN_CODE)
    assert main(["generate", str(tmp_path), "Hi"]) == 2
    error = capsys.readouterr().err
    assert "comes with code of its own" in error and error.count("\n") == 1
    known = describe_model(tmp_path, trust_remote_code=True)
    assert (known.kind, known.name, known.vocab_size) == ("in place", "own", 97)
    made = model_of(tmp_path, None, trust_remote_code=True)
    assert type(made).__name__ == "OwnForCausalLM"


@pytest.mark.slow
def test_the_command_says_which_kind_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = build(Architecture("opt", fields=(("vocab_size", 256),)))
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    models.save_byte_tokenizer(tmp_path)
    prompts, file = tmp_path / "prompts.txt", tmp_path / "answers.json"
    prompts.write_text("Hi\nHow are you?\n")
    command = ["generate", str(tmp_path), "--prompts", str(prompts), "--tp", "2"]
    options = ["--max-new-tokens", "4", "--dtype", "fp32", "--json", str(file), "--no-chat"]
    assert main([*command, *options]) == 0
    found = json.loads(file.read_text())
    assert (found["kind"], found["architecture"]) == ("in place", "opt")
    assert found["layers_per_stage"] is None and len(found["weight_bytes_per_rank"]) == 2
    assert all(size > 0 for size in found["cache_bytes_per_rank"])
    assert [len(answer["token_ids"]) for answer in found["answers"]] == [4, 4]
    assert capsys.readouterr().err.startswith("opt, split in place: 8 tokens, ")
