"""A model's directory that leads elsewhere, or to what is no file, is refused by every reader."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.any_model.export import write_hf_directory
from colrow.checkpoint import training_index
from colrow.checkpoint.opening import open_reader
from colrow.checkpoint.pretrained import pretrained_config, stored_dtype
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.checkpoint.training_index import INDEX, read_index
from colrow.cli import main
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.generation.tokenizer import end_tokens, load_tokenizer
from colrow.models.hf_config import config_from_file
from colrow.planner import model_from_config_json
from colrow.planner.machine_file import load_machine
from colrow.train.documents import documents
from colrow.train.tokens import Encoded, TokenFile, write_tokens
from tests.models.tiny import SMALLEST

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same with an index and one shard."""
    (model / "model.safetensors").rename(model / SHARD)
    with open_reader(model / SHARD) as reader:
        names = reader.names()
    write_index(model, dict.fromkeys(names, SHARD))
    return model


def write_index(directory: Path, weight_map: dict[str, Any]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def move_out(path: Path) -> None:
    path.rename(path.parent.parent / "outside")
    path.symlink_to("../outside")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "named", ["../outside", "/etc/hostname", "sub/../../outside", "", ".", "x\0", 5, None], ids=repr
)
def test_an_index_names_files_of_its_directory_alone(sharded: Path, named: Any) -> None:
    shutil.copy(sharded / SHARD, sharded.parent / "outside")
    write_index(sharded, {"model.norm.weight": named})
    with pytest.raises(ValueError, match=r"index.json (names|has no 'weight_map' from)"):
        open_reader(sharded)


@pytest.mark.parametrize("damage", [move_out, replace_by_pipe, replace_by_directory])
def test_a_shard_is_a_file_of_the_directory(sharded: Path, damage: Callable[[Path], None]) -> None:
    damage(sharded / SHARD)
    with pytest.raises(ValueError, match=rf"names '{SHARD}': .*(leads out|not a regular file)"):
        open_reader(sharded)


def test_a_shard_in_a_folder_is_read(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    (sharded / SHARD).rename(sharded / "sub" / "x.safetensors")
    write_index(sharded, {"model.norm.weight": "sub/x.safetensors"})
    with open_reader(sharded) as reader:
        assert reader.shape("model.norm.weight") == (32,)


def test_a_directory_of_the_hub_cache_is_read(original: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(original, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    whole = colrow.from_pretrained(original)
    linked = colrow.from_pretrained(snapshot)
    assert torch.equal(linked.embedding.weight, whole.embedding.weight)
    assert load_tokenizer(snapshot).chat_template
    assert colrow.plan_for(str(snapshot), 2).rows


READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "config.json": (
        colrow.from_pretrained,
        pretrained_config,
        config_from_file,
        model_from_config_json,
        stored_dtype,
        colrow.from_config,
        lambda path: colrow.plan_for(str(path), 2),
    ),
    "model.safetensors": (colrow.from_pretrained, open_reader),
    "tokenizer.json": (load_tokenizer,),
    "tokenizer_config.json": (load_tokenizer,),
    "chat_template.jinja": (load_tokenizer,),
    "generation_config.json": (
        lambda path: end_tokens(path, ()),
        lambda path: colrow.plan_for(str(path), 2),
    ),
}


@pytest.mark.parametrize("damage", [move_out, replace_by_pipe, replace_by_directory])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_looks_first(name: str, damage: Callable[[Path], None], model: Path) -> None:
    damage(model / name)
    for reader in READERS[name]:
        with pytest.raises(ValueError, match=rf"{name} (leads out of|is a )"):
            reader(model)


COMMANDS = [
    "generate {} hi",
    "verify {} --tp 2",
    "verify {} --tp 2 --in-place",
    "comms {} --tp 2",
    "plan {} --tp 2",
    "parallelize {} --explain",
    "bench {} --tp 1",
    "convert {} {}-new --to hf",
    "train --model {} --data {}/config.json --output {}-run",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_waits_for_a_pipe(
    command: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_by_pipe(model / "config.json")
    assert main(command.replace("{}", str(model)).split()) == 2
    error = capsys.readouterr().err
    assert "config.json is a named pipe, not a regular file" in error
    assert len(error.strip().splitlines()) == 1


def test_files_that_the_user_names(model: Path, tmp_path: Path, smollm2: Path) -> None:
    """A link that the user types is followed; a pipe is not waited for."""
    (tmp_path / "link.gguf").symlink_to(smollm2.resolve())
    open_reader(tmp_path / "link.gguf").close()
    (tmp_path / "link.safetensors").symlink_to(model / "model.safetensors")
    open_reader(tmp_path / "link.safetensors").close()
    (tmp_path / "link.json").symlink_to(model / "config.json")
    assert config_from_file(tmp_path / "link.json").vocab_size == 256
    for name in ("x.gguf", "x.safetensors", "x.json", "x.toml", "x.txt", "x.jsonl"):
        os.mkfifo(tmp_path / name)
    for call in (
        lambda: open_reader(tmp_path / "x.gguf"),
        lambda: open_reader(tmp_path / "x.safetensors"),
        lambda: config_from_file(tmp_path / "x.json"),
        lambda: load_machine(tmp_path / "x.toml"),
        lambda: load_machine(tmp_path / "x.json"),
        lambda: list(documents(tmp_path / "x.txt")),
        lambda: list(documents(tmp_path / "x.jsonl")),
    ):
        with pytest.raises(ValueError, match="is a named pipe, not a regular file"):
            call()


@pytest.mark.parametrize(
    "command",
    [
        "train {} --model m --data d --output o",
        "plan llama-3-8b --gpus 8 --machine {}",
        "generate {model} --prompts {}",
        "generate {model} --prompt-file {}",
    ],
)
def test_pipes_that_a_user_names(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = command.replace("{model}", str(model)).replace("{}", str(tmp_path / "pipe"))
    assert main(words.split()) == 2
    assert "pipe is a named pipe, not a regular file" in capsys.readouterr().err


# training checkpoints


def alone() -> Mesh:
    single = ParallelGroup.single
    return Mesh(single("tp"), single("dp"), single("pp"), None, torch.device("cpu"))


@pytest.fixture
def saved(tmp_path: Path) -> TrainingCheckpoints:
    """A checkpoint of a layer, and beside it a file that it has no business with."""
    checkpoints = TrainingCheckpoints(tmp_path / "run", alone())
    layer = colrow.from_config(SMALLEST)
    checkpoints.save(1, layer, torch.optim.SGD(layer.parameters(), lr=0.1), {})
    checkpoints.wait()
    shutil.copy(checkpoints.path(1) / "rank-00000.safetensors", tmp_path / "outside")
    return checkpoints


def change(checkpoints: TrainingCheckpoints, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the index and makes its checksum right, as whoever wrote it can."""
    path = checkpoints.path(1) / INDEX
    content = json.loads(path.read_text())
    content.pop("sha256")
    edit(content)
    path.write_text(json.dumps({**content, "sha256": training_index._digest(content)}))


def first(index: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = index["tensors"]["model.norm.weight"]
    return tensor


EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda i: first(i)["chunks"][0].update(file="../../outside"), "in '../../outside', which"),
    (lambda i: first(i)["chunks"][0].update(file=None), "in None, which has no checksum"),
    (lambda i: i["files"].update({"../x": {"bytes": 0, "sha256": ""}}), "names '../x', outside"),
    (lambda i: i["files"].update({"/x": {"bytes": 0, "sha256": ""}}), "names '/x', outside"),
    (lambda i: i["files"].update({"..": {"bytes": 0, "sha256": ""}}), "names '..', outside"),
    (lambda i: i["files"].update({"x\0": {"bytes": 0, "sha256": ""}}), "names 'x.x00', outside"),
    (lambda i: i["files"].update({"x": {"bytes": -1, "sha256": ""}}), "no size and checksum"),
    (lambda i: i["files"].update({"x": 1}), "'x' is not a table"),
    (lambda i: i.update(files=[]), "'files' is not a table"),
    (lambda i: first(i).update(dtype="load"), "has the dtype 'load'"),
    (lambda i: first(i).update(shape=[1 << 62, 8]), "no shape and boxes"),
    (lambda i: first(i).update(shape=[True]), "no shape and boxes"),
    (lambda i: first(i)["chunks"][0].update(sizes=[9]), "lies outside the tensor"),
    (lambda i: first(i)["chunks"][0].update(offsets=[-1]), "lies outside the tensor"),
    (lambda i: first(i)["chunks"][0].update(offsets=[0, 0]), "lies outside the tensor"),
    (lambda i: i["state"].update(user=[]), "'user' is not a table"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS, ids=[message for _, message in EDITS])
def test_an_index_with_a_right_checksum_is_not_trusted(
    saved: TrainingCheckpoints, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    change(saved, edit)
    with pytest.raises(ValueError, match=rf"index.json is damaged: .*{message}"):
        saved.load(1, colrow.from_config(SMALLEST), None)


def test_files_of_a_training_checkpoint(saved: TrainingCheckpoints) -> None:
    saved.load(1, colrow.from_config(SMALLEST), None)
    file = saved.path(1) / "rank-00000.safetensors"
    file.rename(saved.path(1).parent / "elsewhere")
    file.symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        saved.load(1, colrow.from_config(SMALLEST), None)
    replace_by_pipe(file)
    with pytest.raises(ValueError, match="is a named pipe"):
        saved.load(1, colrow.from_config(SMALLEST), None)
    replace_by_pipe(saved.path(1) / INDEX)
    with pytest.raises(ValueError, match="is a named pipe"):
        read_index(saved.path(1))


def test_token_files(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [Encoded([1, 2, 3])], vocab_size=10)
    meta = json.loads((tmp_path / "t" / "tokens.json").read_text())
    for wrong in ({"dtype": "object"}, {"dtype": "float64"}, {"tokens": 3.0}, {"tokens": None}):
        (tmp_path / "t" / "tokens.json").write_text(json.dumps({**meta, **wrong}))
        with pytest.raises(ValueError, match="is not a token file"):
            TokenFile.open(tmp_path / "t")
    (tmp_path / "t" / "tokens.json").write_text(json.dumps(meta))
    move_out(tmp_path / "t" / "tokens.bin")
    with pytest.raises(ValueError, match="leads out of"):
        TokenFile.open(tmp_path / "t")


# writers


def test_an_export_takes_and_leaves_nothing_elsewhere(model: Path, tmp_path: Path) -> None:
    decoder = colrow.from_pretrained(model)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    for target in ("link", "dangling", "pipe"):
        with pytest.raises(ValueError, match=f"{target} is a link or no directory"):
            write_hf_directory(decoder, tmp_path / target, model, torch.float32)
    for name in ("dangling", "link", "pipe"):
        assert main(["convert", str(model), str(tmp_path / name), "--to", "hf"]) == 2
    (model / "notes.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match=r"notes.txt leads out of"):
        write_hf_directory(decoder, tmp_path / "new", model, torch.float32)
    (model / "notes.txt").unlink()
    os.mkfifo(model / "notes.txt")
    with pytest.raises(ValueError, match=r"notes.txt is a named pipe"):
        write_hf_directory(decoder, tmp_path / "new", model, torch.float32)
    left = {"model", "secret", "empty", "link", "dangling", "pipe"}
    assert {path.name for path in tmp_path.iterdir()} == left
