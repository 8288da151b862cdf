"""``colrow comms`` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from colrow.any_model.loading import load_model
from colrow.any_model.predicted_calls import predict
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call
from colrow.comm.mesh import Mesh
from colrow.models.interface import PredictedCalls
from colrow.tiny_models.architectures import Architecture, build
from colrow.verification.traffic import Traffic, record_step
from tests.ranks import RankPool

# Each in place: fused and separate projections, soft caps, experts, one KV head, latents, biases.
IN_PLACE = (
    "olmo2",
    "phi3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "falcon",
    "gpt_bigcode",
    "cohere",
    "opt",
    "deepseek_v3",
)
FIELDS = {"op", "phase", "layer", "bytes", "dtype", "group", "count"}


@pytest.mark.parametrize("flags", [[], ["--sequence-parallel"]], ids=["plain", "sequence"])
def test_a_checkpoint_on_real_ranks(tiny_models: Path, tmp_path: Path, flags: list[str]) -> None:
    out = tmp_path / "comms.json"
    model = str(tiny_models / "qwen2")
    assert main(["comms", model, "--tp", "2", "--sequence", "9", "--json", str(out), *flags]) == 0
    report = json.loads(out.read_text())
    assert report["equal"] is True
    assert report["predicted"] == report["recorded"]
    assert all(row.keys() == FIELDS for row in report["recorded"])
    assert report["seconds"] > 0


def steps(tp: ParallelGroup, path: str, sequence_parallel: bool) -> list[Traffic]:
    single = ParallelGroup.single
    mesh = Mesh(tp, single("dp"), single("pp"), None, torch.device("cpu"))
    model = load_model(
        path, mesh, dtype=torch.float32, in_place=True, sequence_parallel=sequence_parallel
    )
    return [record_step(model, batch=b, sequence=s) for b, s in ((1, 9), (3, 14))]


@pytest.mark.cpu_only("tiny models of transformers, on the CPU")
@pytest.mark.parametrize("name", [*IN_PLACE, "gemma2+sequence", "cohere+sequence"])
def test_a_model_in_place(name: str, tmp_path: Path, ranks: RankPool) -> None:
    name, _, sequence = name.partition("+")
    model: Any = build(Architecture(name))
    model.save_pretrained(tmp_path)
    n = 2 + len(name) % 2
    for found in ranks(n, steps, str(tmp_path), bool(sequence), timeout=240):
        for traffic in found:
            assert traffic.kind == "in place" and not traffic.unknown
            assert traffic.predicted == traffic.recorded and len(traffic.recorded) > 5


def foretold(tp: ParallelGroup, changes: str) -> PredictedCalls:
    def forward(batch: int, sequence: int, seed: int) -> list[Call]:
        size = 4 * batch * sequence
        if changes == "sizes":
            size += seed % 2 * sequence**2
        kinds = 1 + (changes == "kinds" and seed == 3)
        return [Call("all_reduce", "forward", "expert", size, "float32")] * kinds

    return predict(torch.nn.Linear(2, 2), tp, forward, 4, 10)


def test_what_depends_on_the_tokens_is_not_foretold(ranks: RankPool) -> None:
    assert ranks(2, foretold, "")[0].calls[0].bytes == 4 * 4 * 10
    for changes in ("kinds", "sizes"):
        (found, _) = ranks(2, foretold, changes)
        assert found.calls == () and "depend" in found.unknown


def test_other_architectures_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comms.json"
    model: Any = build(Architecture("opt"))
    model.save_pretrained(tmp_path)
    command = ["comms", str(tmp_path), "--tp", "2", "--sequence", "9"]
    assert main([*command, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["equal"] is True and report["kind"] == "in place"
    text = capsys.readouterr().out
    assert "split in place" in text and "model.decoder.layers.*.fc2" in text
    assert main([*command, "--dry-run"]) == 2
    assert "this opt is split in place, which takes real ranks" in capsys.readouterr().err


def test_a_model_far_too_large_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comms", "gpt3-175b", "--tp", "8", "--sequence", "2048", "--dtype", "bf16"]) == 0
    text = capsys.readouterr().out
    assert "Predicted and recorded are equal, call for call and byte for byte." in text
    assert "50.3 MB" in text  # 2048 x 12288 x 2 bytes
    assert main(["comms", "gpt3-175b", "--tp", "8", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] and report["seconds"] is None


def test_a_configuration_without_weights(tiny_models: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((tiny_models / "bloom" / "config.json").read_text())
    assert main(["comms", str(config), "--tp", "3"]) == 0
    assert main(["comms", str(tmp_path), "--tp", "3"]) == 0


def test_a_cached_hub_id_comes_before_a_public_name(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--gpt3-175b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_models / "gpt2", repository / "snapshots" / ("0" * 40))
    out = tmp_path / "comms.json"
    command = ["comms", "gpt3-175b", "--tp", "2", "--sequence", "9", "--dry-run"]
    assert main([*command, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["recorded"]
    assert [row["bytes"] for row in rows if row["layer"] == "embedding"] == [9 * 40 * 4]


def test_an_unknown_name_says_where_it_was_looked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["comms", "gpt3-175c"]) == 2
    message = capsys.readouterr().err
    assert "did you mean gpt3-175b" in message and "There is no such file" in message
    assert f"no snapshot of 'gpt3-175c' in the cache '{tmp_path}'" in message
    assert "`hf download gpt3-175c` fetches it" in message


def test_one_rank_of_a_launcher_reports_a_dry_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["comms", "gpt3-175b", "--tp", "8"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt3-17b"], "unknown model 'gpt3-17b': did you mean gpt3-175b"),
        (["gpt3-175b", "--tp", "97"], "96 query heads cannot be split over 97 ranks"),
        (["gpt3-175b", "--sequence", "1"], "--sequence must be at least 2"),
        (["gpt3-175b", "--sequence", "2049"], "2049 positions is longer than the model's 2048"),
        (["gpt3-175b", "--recompute-gather"], "changes --sequence-parallel alone: give both"),
        (["nowhere.gguf"], "there is no model at 'nowhere.gguf'"),
        (["gpt3-175b", "--tp", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["comms", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
