"""What a user can get wrong with a whole model: an error that says so, before a wrong number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import colrow
from colrow.comm.group import ParallelGroup
from colrow.models.hf_config import config_from_hf
from tests.ranks import RankError, RankPool

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def with_ids(tp: ParallelGroup, ids: list[list[int]]) -> None:
    colrow.from_config(LLAMA, tp)(torch.tensor(ids))


def with_different_batches(tp: ParallelGroup, kind: str) -> None:
    model = colrow.from_config(LLAMA, tp)
    ids = torch.arange(12).view(2, 6)
    labels = ids.clone()
    if tp.rank == 1:
        if kind == "ids":
            ids = ids + 1
        elif kind == "swapped":
            ids = ids.flip(0)
        elif kind == "labels":
            labels[1, 3] = 5
        else:
            ids = labels = ids[:, :5]
    model.loss(ids, labels)


def with_different_dropout(tp: ParallelGroup, how: str) -> None:
    model = colrow.from_config({**LLAMA, "attention_dropout": 0.1}, tp).train()
    ids = torch.arange(12).view(2, 6)
    if how == "one in training":
        model.train(tp.rank == 0)
    torch.manual_seed(tp.rank if how == "generators" else 0)
    key = 5 + tp.rank if how == "keys" else None
    if how == "forward":
        torch.manual_seed(tp.rank)
        model(ids)
    else:
        model.loss(ids, ids, dropout_key=key)


@pytest.mark.parametrize("how", ["generators", "keys", "forward", "one in training"])
@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_ranks_with_different_dropout(ranks: RankPool, how: str) -> None:
    said = "would draw different dropout masks: .*torch.manual_seed with the same number on all tp"
    with pytest.raises(RankError, match=said) as caught:
        ranks(2, with_different_dropout, how)
    assert set(caught.value.errors) == {0, 1}


def with_different_seeds(tp: ParallelGroup) -> None:
    colrow.from_config(LLAMA, tp, seed=tp.rank)


@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_ranks_with_different_seeds(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="were given different seeds") as caught:
        ranks(2, with_different_seeds)
    assert set(caught.value.errors) == {0, 1}


def test_a_loss_needs_a_next_token() -> None:
    model, ids = colrow.from_config(LLAMA), torch.zeros(2, 1, dtype=torch.long)
    assert model(ids).shape == (2, 1, 97)
    with pytest.raises(ValueError, match=r"sequences of one token .* give it at least two"):
        model.loss(ids, ids)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("bad", [97, -1])
@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_token_outside_the_vocabulary(ranks: RankPool, size: int, bad: int) -> None:
    with pytest.raises(RankError, match=rf"token id {bad} is outside the valid range 0 to 96"):
        ranks(size, with_ids, [[1, 2, bad]])


@pytest.mark.parametrize("kind", ["ids", "swapped", "labels", "shape"])
@pytest.mark.cpu_only("a GPU asserts it, which ends the process")
def test_ranks_with_different_batches(ranks: RankPool, kind: str) -> None:
    with pytest.raises(RankError, match="were given different batches") as caught:
        ranks(2, with_different_batches, kind)
    assert set(caught.value.errors) == {0, 1}


def test_shapes_of_a_batch() -> None:
    model = colrow.from_config(LLAMA)
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input_ids should be \[batch, sequence\]"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"attention_mask should be \(2, 5\)"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"labels .* should have the shape of input_ids"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(TypeError, match="token ids must be int64 or int32"):
        model(ids.float())


def test_learned_positions_end() -> None:
    gpt2 = {
        "model_type": "gpt2",
        "vocab_size": 9,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 4,
    }
    with pytest.raises(ValueError, match="5 positions is longer than the model's 4"):
        colrow.from_config(gpt2)(torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "unknown architecture 'mamba': the decoder knows bloom, cohere",
        ),
        ({"vocab_size": None}, "no integer 'vocab_size'"),
        ({"hidden_act": "mish"}, "activation 'mish': the decoder knows gelu"),
        ({"hidden_size": 41}, "hidden_size=41 is not a multiple of num_heads=5"),
        ({"num_key_value_heads": 3}, "num_heads=5 is not a multiple of num_kv_heads=3"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope' is not supported"),
        ({"head_dim": 7}, "7 is not even"),
    ],
)
def test_configurations_that_cannot_be_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA, **change})


def test_options_of_a_family_that_the_decoder_lacks() -> None:
    with pytest.raises(ValueError, match="apply_residual_connection_post_layernorm=True"):
        config_from_hf(
            {
                "model_type": "bloom",
                "vocab_size": 9,
                "hidden_size": 8,
                "n_layer": 1,
                "n_head": 2,
                "apply_residual_connection_post_layernorm": True,
            }
        )


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        (6, {}, "5 query heads cannot be split over 6 ranks"),
        (5, {"vocab_size": 4}, "4 vocabulary rows cannot be split over 5 ranks"),
        (5, {"intermediate_size": 4}, "4 FFN features cannot be split over 5 ranks"),
    ],
)
def test_more_ranks_than_the_model_has_parts(
    size: int, change: dict[str, object], message: str
) -> None:

    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA, **change}).divide(size)


@pytest.fixture
def checkpoint(tiny_models: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_models / "llama", copy)
    return copy


def test_missing_tensor(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight of the 21"):
        colrow.from_pretrained(checkpoint)


def test_extra_tensor(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"has model\.layers\.2\.mlp\.up_proj\.weight beyond"):
        colrow.from_pretrained(checkpoint)


def test_mis_shaped_tensor(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["intermediate_size"] = 100
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"shape \(101, 40\), but the configuration asks for"):
        colrow.from_pretrained(checkpoint)


def test_checkpoint_without_the_leading_name(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    whole = colrow.full_state_dict(colrow.from_pretrained(checkpoint))
    save_file(bare, checkpoint / "model.safetensors")
    again = colrow.full_state_dict(colrow.from_pretrained(checkpoint))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_cache_and_sequence_parallelism_have_no_gradients(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"generate under torch\.no_grad"):
        ranks(2, with_cache)


def with_cache(tp: ParallelGroup) -> None:
    model = colrow.from_config(LLAMA, tp, sequence_parallel=True)
    cache = model.make_cache(1, 4)
    model(torch.ones(1, 4, dtype=torch.long), cache=cache)
