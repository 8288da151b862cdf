"""Exported and converted models against transformers, which loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import colrow
from colrow.any_model.loading import load_model, load_trained
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.train.loop import train
from colrow.verification.reference import precision, prepare_reference, quiet_transformers
from tests.models import tiny
from tests.ranks import RankPool
from tests.train.curves import logged, reference, settings_for, worst, write_inputs


def transformers_loss(directory: Path, ids: torch.Tensor) -> float:
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        model = prepare_reference(AutoModelForCausalLM.from_pretrained(directory).double())
    with torch.no_grad(), precision(torch.float64):
        return float(model(input_ids=ids, labels=ids).loss)


def loss_of_run(tp: ParallelGroup, run: str) -> float:
    single = ParallelGroup.single
    mesh = Mesh(tp, single("dp"), single("pp"), None, torch.device("cpu"))
    ids = tiny.batch()
    return load_model(run, mesh).module.loss(ids, ids).item()


def test_an_export_has_the_loss_that_training_logged(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    settings = settings_for(tmp_path, "run", steps=4, precision="fp64", eval_sequences=4)
    outcome = train(settings)
    assert worst(logged(settings), reference(settings)) == pytest.approx((0, 0), abs=1e-12)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "fp64"]) == 0
    from colrow.train.batches import Order, Windows
    from colrow.train.tokenize import prepare_tokens

    file = prepare_tokens(
        settings.data, "bytes", settings.token_cache, vocab_size=257, end_token=256
    )
    held_out = Windows.of(file, settings.sequence).split(settings.eval_share)[1]
    ids, _ = Order(held_out, 0).batch(0, 4)
    assert transformers_loss(tmp_path / "hf", ids) == pytest.approx(outcome.eval_loss, rel=1e-12)
    # A second export of the same name must not write over the first.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2


@pytest.mark.parametrize("name", tiny.CASES)
def test_every_family_goes_through_a_training_run_and_back(
    tiny_models: Path, tmp_path: Path, name: str, ranks: RankPool
) -> None:
    source, ids = tiny_models / name, tiny.batch()
    run, back = str(tmp_path / "run"), tmp_path / "hf"
    assert main(["convert", str(source), run, "--to", "run", "--dtype", "fp64"]) == 0
    assert main(["convert", run, str(back), "--to", "hf", "--dtype", "fp64"]) == 0
    expected = torch.load(tiny_models / f"{name}-{torch.float64}.pt", weights_only=True)["loss"]
    if not name.startswith("bloom"):  # whose activation transformers rounds
        assert transformers_loss(back, ids) == pytest.approx(expected.item(), rel=1e-12)
    model = colrow.from_pretrained(back, dtype=torch.float64)
    assert model.loss(ids, ids).item() == pytest.approx(expected.item(), rel=1e-12)
    if name == "llama":  # whose run runs on four ranks, too
        assert ranks(4, loss_of_run, run) == pytest.approx([expected.item()] * 4, rel=1e-12)


@pytest.mark.parametrize("name", tiny.CASES)
def test_configurations_written_are_configurations_read(tiny_models: Path, name: str) -> None:
    from colrow.checkpoint.export_config import config_to_hf
    from colrow.models.compose import decoder, fields_of
    from colrow.models.hf_config import config_from_file, config_from_hf

    with quiet_transformers():
        from transformers import AutoConfig

    config = config_from_file(tiny_models / name)
    further = decoder(**{**fields_of(config), "windows": ()})
    for same in (config, *([] if name == "cohere2" else [further])):  # whose windows alone rotate
        written = json.loads(json.dumps(config_to_hf(same)))
        assert config_from_hf(written) == same
        # transformers assumes a window where Mistral's configuration does not say that it has none.
        assert config_from_hf(AutoConfig.for_model(**written).to_dict()) == same


@pytest.mark.slow
def test_a_gguf_file_goes_to_hugging_face_and_back(smollm2: Path, tmp_path: Path) -> None:
    hf, gguf = tmp_path / "hf", tmp_path / "copy.gguf"
    assert main(["convert", str(smollm2), str(hf), "--to", "hf"]) == 0
    ids = torch.tensor([[1, 504, 2644, 282, 4649, 314, 260, 3617]])
    model = colrow.from_pretrained(smollm2).double()
    expected = model.loss(ids, ids).item()
    assert transformers_loss(hf, ids) == pytest.approx(expected, rel=1e-6)
    like = ["--like", str(smollm2)]
    assert main(["convert", str(hf), str(gguf), "--to", "gguf", *like]) == 0
    again = colrow.from_pretrained(gguf).state_dict()
    for key, value in colrow.from_pretrained(smollm2).state_dict().items():
        assert torch.equal(again[key], value), key
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"


def test_a_directory_that_is_no_run_is_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "hf")]) == 2
    assert "has no checkpoints: give the --output of colrow train" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no checkpoints"):
        load_trained(tmp_path)
