"""Training transformers' own models, split in place, against transformers' models and torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.any_model.loading import alone, load_model
from colrow.checkpoint.assemble import full_state_dict
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.tiny_models.architectures import Architecture, build
from colrow.train.loop import train
from colrow.train.settings import TrainSettings
from colrow.train.starting_model import build_model, check_settings
from colrow.verification.reference import quiet_transformers
from tests.ranks import RankPool, run_world
from tests.train import runs
from tests.train.curves import curve_of, logged, settings_for, write_inputs
from tests.train.layouts import RATE, Layout, make_mesh, torch_loop
from tests.train.runs import assert_same, curve, expected, load


def make_settings(model: Path | str, **options: Any) -> TrainSettings:
    return runs.make_settings(model, in_place=True, **options)


ARCHITECTURES = ["olmo2", "phi3", "gemma3_text", "mixtral", "falcon"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of every architecture, in files; no weight is 0 or 1."""
    root = tmp_path_factory.mktemp("architectures")
    for name in ARCHITECTURES:
        model: Any = build(Architecture(name, fields=(("vocab_size", 257),)))
        with quiet_transformers():
            model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_curve_is_transformers_across_a_reshard(
    ranks: RankPool, directories: Path, tokens: Path, tmp_path: Path, name: str
) -> None:
    """Two steps on each of 2, 1 and 3 ranks, from checkpoint to checkpoint."""
    found = []
    for first, tp in ((0, 2), (2, 1), (4, 3)):
        settings = make_settings(directories / name, tp=tp, microbatch=4)
        found += ranks(
            tp, curve, settings, tokens, first, first + 2, tmp_path / "run", timeout=300
        )[0]
    assert_same(found, expected(directories / name, tokens))


@pytest.mark.parametrize(
    "options",
    [
        {"dp": 2},
        {"dp": 2, "fsdp": True, "recompute": "full"},
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "dp": 2, "fsdp": True, "sequence_parallel": True},
        {"tp": 2, "recompute": "full"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_layout_has_the_same_curve(
    ranks: RankPool, directories: Path, tokens: Path, options: dict[str, Any]
) -> None:
    """Two microbatches on every rank."""
    name = "gemma3_text" if "sequence_parallel" in options else "mixtral"
    dp = options.get("dp", 1)
    settings = make_settings(directories / name, microbatch=4 // dp, **options)
    found = ranks(settings.ranks, curve, settings, tokens, 0, 2, timeout=300)[0]
    assert_same(found, expected(directories / name, tokens)[:2])


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_optimisers_of_whole_tensors_are_torchs(
    ranks: RankPool, directories: Path, tokens: Path, optimizer: str
) -> None:
    settings = make_settings(directories / "phi3", tp=2, microbatch=4, optimizer=optimizer)
    found = ranks(2, curve, settings, tokens, 0, 3, timeout=300)[0]
    model = load(directories / "phi3")
    named = dict(model.named_parameters())
    inside = [p for n, p in named.items() if ".layers." in n and p.dim() == 2]
    matrices, vectors = ([p for p in named.values() if (p.dim() > 1) == flag] for flag in (1, 0))
    if optimizer == "muon":
        others = [p for p in matrices if not any(p is q for q in inside)]
        made = [
            torch.optim.Muon(
                inside, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", nesterov=True
            ),
            torch.optim.AdamW(
                [
                    {"params": others, "weight_decay": 0.1},
                    {"params": vectors, "weight_decay": 0.0},
                ],
                lr=RATE,
                betas=(0.9, 0.95),
            ),
        ]
    else:
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
        made = [torch.optim.Adafactor(groups, lr=RATE)]
    assert_same(found, torch_loop(model, tokens, 3, optimizers=made))


def test_dropout_and_recomputation(ranks: RankPool, directories: Path, tokens: Path) -> None:
    """The same masks when a block runs again; other ones in every step, none in evaluation."""
    settings = make_settings(directories / "falcon", tp=2, microbatch=4, dropout=0.1)
    kept = ranks(2, curve, settings, tokens, 0, 2, timeout=300)
    again = ranks(2, curve, replace(settings, recompute="full"), tokens, 0, 2, timeout=300)
    assert again == kept and kept[0] == kept[1]
    whole = expected(directories / "falcon", tokens)
    assert abs(kept[0][0][0] / whole[0][0] - 1) > 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precisions(ranks: RankPool, directories: Path, tokens: Path, precision: str) -> None:
    settings = make_settings(directories / "phi3", tp=2, microbatch=4, precision=precision)
    found = ranks(2, curve, settings, tokens, 0, 2, timeout=300)[0]
    limit = {"fp32": 1e-5}.get(precision, 2e-2)
    wanted = expected(directories / "phi3", tokens)
    for (loss, norm), (exact, exact_norm) in zip(found, wanted, strict=False):
        assert loss == pytest.approx(exact, rel=limit)
        assert norm == pytest.approx(exact_norm, rel=10 * limit)


CONFIG = {
    "model_type": "stablelm",
    "vocab_size": 257,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 101,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}


def run_settings(directory: Path, **options: Any) -> TrainSettings:
    """Of a run as a person starts it."""
    return settings_for(directory, "run", precision="fp64", in_place=True, **options)


def transformers_loop(settings: TrainSettings) -> list[tuple[float, float]]:
    """The run's curve by transformers' model from the configuration and the seed."""
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(settings.seed)
        config = AutoConfig.from_pretrained(settings.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return curve_of(settings, model)


def whole_of_run(world: ParallelGroup, run: str) -> dict[str, torch.Tensor]:
    model = load_model(run, make_mesh(world, Layout(tp=2, dp=2)))
    assert model.description.kind == "in place"
    return full_state_dict(model.module)


def test_a_run_from_a_configuration_resumes_and_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: RankPool
) -> None:
    """Random weights are transformers' own; the run stops, goes on on another grid, is exported."""
    write_inputs(tmp_path, CONFIG)
    settings = run_settings(tmp_path, steps=4, save_every=2, learning_rate=1e-3)
    run_world(2, train, replace(settings, steps=2, tp=2, output=settings.output), timeout=300)
    train(settings)
    assert "stablelm: transformers' model, split in place" in capsys.readouterr().err
    assert Path(settings.output, "loss.png").exists()
    records = logged(settings)
    assert_same([(r["loss"], r["grad_norm"]) for r in records[2:]], transformers_loop(settings)[2:])
    out = tmp_path / "hf"
    assert main(["export", settings.output, str(out), "--dtype", "fp64"]) == 0
    exported = load(out).state_dict()
    run = TrainingCheckpoints(Path(settings.output) / "checkpoints", alone())
    module = build_model(replace(settings, model=str(tmp_path / "config.json")), alone()).module
    run.load(4, module, None)
    trained = dict(module.named_parameters())
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], value) for name, value in trained.items())
    # And on: a run that begins with it, and back.
    again, back = str(tmp_path / "again"), tmp_path / "back"
    assert main(["convert", str(out), again, "--to", "run", "--dtype", "fp64"]) == 0
    assert main(["convert", again, str(back), "--to", "hf", "--dtype", "fp64"]) == 0
    for name, value in load(back).state_dict().items():
        assert torch.equal(value, exported[name]), name
    whole = ranks(4, whole_of_run, again)[0]  # as colrow generate --tp 2 takes it
    assert all(torch.equal(value, exported[name]) for name, value in whole.items())
    assert (
        main(["convert", again, str(tmp_path / "x.gguf"), "--to", "gguf", "--like", "y.gguf"]) == 2
    )
    assert "stablelm is none of the families" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mixtral", "gemma3_text"])
def test_stored_forms_are_transformers(directories: Path, tmp_path: Path, name: str) -> None:
    """Experts that a file holds one by one, tied embeddings: the files are the same again."""
    from safetensors.torch import load_file

    source, run, back = directories / name, str(tmp_path / "run"), tmp_path / "hf"
    assert main(["convert", str(source), run, "--to", "run", "--dtype", "fp64"]) == 0
    assert main(["convert", run, str(back), "--to", "hf", "--dtype", "fp64"]) == 0
    first, second = (load_file(where / "model.safetensors") for where in (source, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp": 2}, "a pipeline of 2 stages: for the described families only"),
        ({"tensor_split": "2,1", "tp": 2}, "a tensor split: for the described families only"),
        ({"recompute": "selective"}, "use recompute=full"),
        ({"recompute": "full", "sequence_parallel": True, "tp": 2}, "leave one of the two out"),
        ({"sequence": 129}, "sequence=129 is longer than the model's 128 positions"),
    ],
)
def test_what_is_not_possible_is_said_before_ranks_start(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_inputs(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=message):
        check_settings(run_settings(tmp_path, steps=1, **options))


def test_a_loss_with_other_terms_is_refused(directories: Path, tmp_path: Path) -> None:
    shutil.copytree(directories / "mixtral", tmp_path / "mixtral")
    file = tmp_path / "mixtral" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "output_router_logits": True}))
    with pytest.raises(ValueError, match="colrow train knows the latter alone"):
        build_model(make_settings(file.parent), alone())
