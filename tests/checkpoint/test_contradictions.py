"""A configuration and a file that do not say the same: transformers' numbers, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import colrow
from colrow.any_model.export import write_hf_directory
from colrow.any_model.loading import alone, load_model
from colrow.checkpoint.naming import hf_naming
from colrow.checkpoint.pretrained import pretrained_config
from colrow.comm.collectives import gather_from_tp
from colrow.comm.group import ParallelGroup
from colrow.models.hf_config import config_from_file
from colrow.train.starting_model import copy_model_files
from colrow.verification.comparison import relative_error
from colrow.verification.reference import load_reference, precision
from tests.generation.test_pipeline import Pipe
from tests.inplace.test_parallelize import mesh_of
from tests.models import tiny
from tests.ranks import RankPool

LIMIT = 1e-12
FAMILIES = ("llama", "mistral-window", "qwen2", "qwen3", "gpt2", "gpt_neox", "bloom")
Change = Callable[[dict[str, Tensor], str, str], object]

# What is done to the embedding and the head of a file whose configuration says tied.
TIED: dict[str, Change] = {
    "differ": lambda tensors, embedding, head: None,
    "equal": lambda tensors, embedding, head: tensors.update({head: tensors[embedding].clone()}),
    "head alone": lambda tensors, embedding, head: tensors.pop(embedding),
}


def write(name: str, directory: Path, keys: dict[str, Any], change: Change) -> None:
    """An untied random model, then its configuration and its file changed."""
    with pytest.MonkeyPatch.context() as patch:
        kind, values = tiny.CASES[name]
        patch.setitem(tiny.CASES, name, (kind, {**values, "tie_word_embeddings": False}))
        tiny.make(name, directory)
    rewrite(directory, keys)
    modules = hf_naming(config_from_file(directory)).modules
    tensors = load_file(directory / "model.safetensors")
    change(tensors, *(f"{modules[m][0]}.weight" for m in ("embedding", "head")))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def rewrite(directory: Path, keys: dict[str, Any]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def reference_logits(directory: Path) -> Tensor:
    reference = load_reference(directory, torch.float64)
    with precision(torch.float64), torch.no_grad():
        result: Tensor = reference(tiny.batch()).logits
    return result


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Directories whose configuration says tied, and transformers' logits."""
    root = tmp_path_factory.mktemp("tied")
    found = {}
    for family in FAMILIES:
        for kind, change in TIED.items():
            directory = root / f"{family} {kind}"
            write(family, directory, {"tie_word_embeddings": True}, change)
            found[str(directory)] = reference_logits(directory)
    return found


def errors(tp: ParallelGroup, expected: dict[str, Tensor]) -> dict[str, tuple[float, bool]]:
    """Of the logits of every directory; and whether the model is tied."""
    found = {}
    for directory, logits in expected.items():
        model = colrow.from_pretrained(directory, tp, dtype=torch.float64)
        with torch.no_grad():
            got = gather_from_tp(model(tiny.batch()), tp, partition=model.vocab)
        found[directory] = (relative_error(got, logits), model.config.tie_embeddings)
    return found


def test_tied_by_configuration_and_not_in_the_file(
    ranks: RankPool, tied: dict[str, Tensor]
) -> None:
    for directory, (error, is_tied) in ranks(2, errors, tied)[0].items():
        assert error < LIMIT, directory
        assert is_tied == (not directory.endswith("differ")), directory
        assert pretrained_config(directory).tie_embeddings == is_tied


def staged_error(world: ParallelGroup, directory: str, expected: Tensor) -> float:
    """Of the head of a pipeline of two stages, whose ends are not tied although that was said."""
    model = Pipe(2, "1,1").load(world, directory)
    assert not model.config.tie_embeddings
    assert (model.head is not None) == (world.rank == 1)
    assert (model.embedding is not None) == (world.rank == 0)
    return relative_error(model.head.weight, expected) if model.head is not None else 0.0


def test_the_ends_of_a_pipeline_hold_what_the_file_holds(
    ranks: RankPool, tied: dict[str, Tensor]
) -> None:
    directory = next(d for d in tied if d.endswith("llama differ"))
    head = load_file(f"{directory}/model.safetensors")["lm_head.weight"]
    assert ranks(2, staged_error, directory, head) == [0.0, 0.0]


def in_place_error(tp: ParallelGroup, directory: str, expected: Tensor) -> float:
    model: Any = colrow.parallelize(directory, mesh_of(tp), dtype=torch.float64)
    with precision(torch.float64), torch.no_grad():
        return relative_error(model(tiny.batch()).logits, expected)


@pytest.mark.parametrize("kind", ["differ", "equal"])
def test_in_place_as_well(ranks: RankPool, tied: dict[str, Tensor], kind: str) -> None:
    directory = next(d for d in tied if d.endswith(f"qwen2 {kind}"))
    assert ranks(2, in_place_error, directory, tied[directory])[0] < LIMIT


def test_what_is_written_says_what_it_holds(tied: dict[str, Tensor], tmp_path: Path) -> None:
    """An export, and the files that a training run keeps, are untied by their configuration."""
    directory = next(d for d in tied if d.endswith("gpt2 differ"))
    files = tmp_path / "files"
    files.mkdir()
    copy_model_files(directory, files)
    assert config_from_file(files).tie_embeddings is False
    write_hf_directory(load_model(directory, alone()), tmp_path / "out", directory, torch.float64)
    assert config_from_file(tmp_path / "out").tie_embeddings is False
    assert relative_error(reference_logits(tmp_path / "out"), tied[directory]) < LIMIT


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        ({"tie_word_embeddings": False}, lambda t, _, head: t.pop(head), r"lacks lm_head\.weight"),
        ({"attention_bias": True}, TIED["differ"], r"lacks model\.layers\.0\.self_attn"),
        ({"num_hidden_layers": 1}, TIED["differ"], r"has model\.layers\.1\.\S+.* beyond what"),
        ({"vocab_size": 96}, TIED["differ"], r"has shape \(97, 40\), but the configuration asks"),
        ({"head_dim": 4}, TIED["differ"], "has shape"),
        (
            {},
            lambda t, *_: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(40)}),
            r"has model\.layers\.0\.self_attn\.q_proj\.bias beyond what a llama model",
        ),
        (
            {},
            lambda t, *_: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}),
            "q_norm.weight beyond what",
        ),
        (
            {},
            lambda t, _, head: t.update({head: t[head].to(torch.int8)}),
            r"'lm_head\.weight' is stored as I8 where torch\.float64 is expected",
        ),
        (
            {},
            lambda t, _, head: t.update({head: t[head].to(torch.float8_e4m3fn)}),
            "stored as F8_E4M3, which cannot be read",
        ),
        ({"dtype": "int8"}, TIED["differ"], "has dtype 'int8', which the decoder does not compute"),
    ],
)
def test_a_file_that_is_not_its_configurations(
    tmp_path: Path, keys: dict[str, Any], change: Change, message: str
) -> None:
    write("llama", tmp_path, keys, change)
    dtype = None if "dtype" in keys else torch.float64
    with pytest.raises(ValueError, match=message):
        colrow.from_pretrained(tmp_path, dtype=dtype)


def test_buffers_of_older_files_are_harmless(tmp_path: Path) -> None:
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write("llama", tmp_path, {}, lambda tensors, *_: tensors.update(inverse))
    assert (
        relative_error(
            colrow.from_pretrained(tmp_path, dtype=torch.float64)(tiny.batch()),
            reference_logits(tmp_path),
        )
        < LIMIT
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda second: second, ""),
        (lambda second: {**second, "lm_head.weight": torch.zeros(97, 40).double()}, ""),
        (
            lambda second: {**second, "model.norm.weight": torch.zeros(40).double()},
            r"'model\.norm\.weight' is in a\.safetensors and in b\.safetensors of .* different v",
        ),
        (
            lambda second: {**second, "model.layers.2.extra.weight": torch.ones(1)},
            r"has model\.layers\.2\.extra\.weight beyond what",
        ),
    ],
)
def test_shards_hold_what_no_index_lists(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    """The head is in a shard that the index names for other tensors, as transformers reads it."""
    write("llama", tmp_path, {}, TIED["differ"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    head = tensors.pop("lm_head.weight")
    both = ("model.norm.weight", "model.embed_tokens.weight")
    second = change({"lm_head.weight": head, **{name: tensors[name] for name in both}})
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    save_file(second, tmp_path / "b.safetensors", {"format": "pt"})
    index = {
        **dict.fromkeys(tensors, "a.safetensors"),
        "model.embed_tokens.weight": "b.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    if message:
        with pytest.raises(ValueError, match=message):
            colrow.from_pretrained(tmp_path, dtype=torch.float64)
        return
    got = colrow.from_pretrained(tmp_path, dtype=torch.float64)(tiny.batch())
    assert relative_error(got, reference_logits(tmp_path)) < LIMIT
