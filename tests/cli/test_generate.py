from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.cli import main
from colrow.generation.tokenizer import encode_prompt, load_tokenizer
from colrow.verification.reference import load_reference
from tests.generation import models
from tests.ranks import child_ranks


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("chat")
    models.save_chat_model(directory)
    return str(directory)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "colrow.cli", "generate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow  # transformers takes ten seconds to read the file
def test_a_real_model_on_two_ranks(smollm2: Path, tmp_path: Path) -> None:
    prompt, file = "Name three colors.", tmp_path / "answer.json"
    process = start(
        str(smollm2),
        prompt,
        *("--tp", "2", "--weights", "fp32"),
        *("--max-new-tokens", "20", "--json", str(file)),
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    result = json.loads(file.read_text())

    tokenizer = load_tokenizer(smollm2)
    ids = encode_prompt(tokenizer, prompt)
    model: Any = load_reference(smollm2, torch.float32)
    mask = torch.ones(1, len(ids), dtype=torch.long)
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([ids]), attention_mask=mask, max_new_tokens=20, do_sample=False
        )
    expected = whole[0, len(ids) :].tolist()
    assert result["token_ids"] == expected
    text = tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert result["text"] == text
    assert out.decode() == text + "\n"
    assert result["prompt_tokens"] == len(ids)
    assert (result["finish_reason"], expected[-1]) == ("stop", 2)
    assert result["tokens_per_second"] > 0
    assert result["time_to_first_token_seconds"] > 0
    unsplit = 4 * sum(p.numel() for p in model.parameters())
    first, second = result["weight_bytes_per_rank"]
    assert unsplit <= first + second < 1.03 * unsplit  # norms, and a KV head that both hold
    assert first < 0.53 * unsplit
    statistics = (
        rf"llama: {len(expected)} tokens, [\d.]+ tokens/s, first token after [\d.]+ s, "
        r"float32 weights "
    )
    assert re.fullmatch(statistics + r"\d+ \+ \d+ MB on 2 ranks, engine \w+\n", err.decode())


@pytest.mark.slow
def test_a_real_model_in_stages_and_unequal_shards(smollm2: Path, tmp_path: Path) -> None:
    prompt, file = "Name three colors.", tmp_path / "answer.json"

    def run(*options: str) -> dict[str, Any]:
        process = start(
            str(smollm2),
            prompt,
            *options,
            *("--weights", "fp32", "--max-new-tokens", "12", "--json", str(file)),
        )
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    model: Any = load_reference(smollm2, torch.float32)
    ids = torch.tensor([encode_prompt(load_tokenizer(smollm2), prompt)])
    with torch.inference_mode():
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    expected = whole[0, ids.shape[1] :].tolist()
    head = (
        4 * (64 * 576 * 2 + 64 * 576 * 2 + 3 * 576) * 30
    )  # a query head with a KV head; a feature
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    embedding = 4 * model.model.embed_tokens.weight.numel()
    weights = 4 * sum(p.numel() for p in model.parameters())

    stages, shards = ("--pp", "2", "--layer-split", "2,1"), ("--tp", "2", "--tensor-split", "2,1")
    found = run(*stages)
    assert found["token_ids"] == expected and found["layers_per_stage"] == [20, 10]
    for held, share in zip(found["weight_bytes_per_rank"], (2 / 3, 1 / 3), strict=True):
        assert abs(held - embedding - share * (weights - embedding)) < layer
    first, second = found["cache_bytes_per_rank"]
    assert first == 2 * second

    found = run(*shards)
    assert found["token_ids"] == expected
    for held, share in zip(found["weight_bytes_per_rank"], (2 / 3, 1 / 3), strict=True):
        assert abs(held - share * weights) < head
    first, second = found["cache_bytes_per_rank"]
    assert first == 2 * second

    found = run(*stages, *shards)
    assert found["token_ids"] == expected
    parts = [(stage, shard) for stage in (2 / 3, 1 / 3) for shard in (2 / 3, 1 / 3)]
    for held, (stage, shard) in zip(found["weight_bytes_per_rank"], parts, strict=True):
        here = embedding + stage * (weights - embedding)
        assert abs(held - shard * here) < head + layer
    assert sum(found["cache_bytes_per_rank"]) == first + second


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["gloo", "mpi"])
def test_answers_to_several_prompts_through_stages(
    chat_model: str, tmp_path: Path, engine: str
) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "answers.json"
    prompts.write_text("Hi\nHow are you?\nWhy\n")
    options = [str(chat_model), "--prompts", str(prompts), "--max-new-tokens", "7"]
    alone = start(*options, "--quiet")
    out, err = alone.communicate(timeout=300)
    assert alone.returncode == 0, err.decode()
    staged = start(*options, "--pp", "2", "--engine", engine, "--json", str(file))
    staged_out, err = staged.communicate(timeout=300)
    assert staged.returncode == 0, err.decode()
    assert staged_out == out
    assert out.startswith(b"[1/3]\n") and b"\n[2/3]\n" in out and b"\n[3/3]\n" in out
    found = json.loads(file.read_text())
    assert found["engine"] == engine and found["layers_per_stage"] == [1, 1]
    assert [answer["prompt_tokens"] for answer in found["answers"]] == [19, 29, 20]
    assert all(len(answer["token_ids"]) == 7 for answer in found["answers"])
    assert err.startswith(b"llama: 21 tokens, ")


def test_a_line_of_a_file_is_a_prompt(
    chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut at newlines alone, so that the answers are those of the file's lines."""
    file = tmp_path / "prompts.txt"
    prompts = ["one\u2028\f\x85 and \r the same", "second", "last"]
    file.write_bytes("\ufeff{}\r\n{}\n{}".format(*prompts).encode())
    options = ["--prompts", str(file), "--max-new-tokens", "1", "--no-chat", "--json", "-"]
    assert main(["generate", chat_model, *options, "--quiet"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [a["prompt_tokens"] for a in answers] == [len(prompt.encode()) for prompt in prompts]
    for content, message in (
        (b"a\n\nb\n", f"line 2 of {file} is empty"),
        (b"a\n \r\n", f"line 2 of {file} is empty"),
        (b"ab\nc\xe9\n", f"{file} is not UTF-8 text: at byte 4 (0xe9, in line 2)"),
    ):
        file.write_bytes(content)
        assert main(["generate", chat_model, *options]) == 2
        assert message in capsys.readouterr().err


def test_json_alone_on_standard_output(
    chat_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi"))
    options = ["--max-new-tokens", "5", "--temperature", "1", "--top-k", "9", "--seed", "3"]
    assert main(["generate", chat_model, "-", *options, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["prompt_tokens"] == len("<user>Hi<assistant>")
    assert result["sampling"] == {"temperature": 1.0, "top_k": 9, "top_p": 1.0, "seed": 3}
    assert len(result["token_ids"]) == 5
    assert len(result["weight_bytes_per_rank"]) == len(result["cache_bytes_per_rank"]) == 1


def test_a_training_run_is_run_as_the_model_that_it_is(
    chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main(["convert", chat_model, run, "--to", "run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {run} from {chat_model}: ") and " kB)" in said
    answers = []
    for model in (chat_model, run):
        options = ["Hi", "--max-new-tokens", "5", "--json", "-"]
        assert main(["generate", model, *options]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[1]["kind"] == "decoder"
    for command, message in (
        (["generate", run, "Hi", "--in-place"], f"colrow export {run} DIRECTORY"),
        (["verify", run], "is a training run, and its weights are in checkpoints"),
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_an_answer_ends_where_the_context_ends(
    chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "short"
    shutil.copytree(chat_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("x" * 35)
    arguments = ["generate", str(directory), "--prompt-file", str(prompt), "--no-chat"]
    assert main([*arguments, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt_tokens"], len(result["token_ids"])) == (35, 5)
    assert result["finish_reason"] == "length"
    prompt.write_text("x" * 40)
    assert main(arguments) == 2
    assert "has 40 tokens and the model's context 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "--temperature", "-1"], "temperature=-1: should be 0 for greedy choice"),
        (["Hi", "--temperature", "1", "--top-p", "0"], "top_p=0: should be above 0"),
        (["Hi", "--temperature", "1", "--top-p", "1.1"], "top_p=1.1: should be above 0"),
        (["Hi", "--top-k", "5"], "temperature=0 always takes the most likely"),
        (["Hi", "--max-new-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["Hi", "--tp", "5"], "use a tensor-parallel size of at most 4"),
        ([" "], "the prompt is empty"),
        ([], "give either PROMPT or --prompt-file"),
        (["Hi", "--prompts", "file"], "give either PROMPT or --prompt-file or --prompts"),
        (["--prompts", os.devnull], "is a device, not a regular file"),
        (
            ["Hi", "--tp", "2", "--tensor-split", "9,1"],
            "gives the ranks 4,0 of the model's 4 query",
        ),
        (["Hi", "--tensor-split", "2,1"], "has 2 numbers for a tensor-parallel size of 1"),
        (["Hi", "--pp", "3"], "3 pipeline stages (3 ranks x 1) need at least as many layers"),
        (["Hi", "--layer-split", "1,1"], "has 2 numbers for 1 pipeline rank: give one"),
        (["--prompt-file", "no/such/file"], "no/such/file: No such file or directory"),
        (["Hi", "--json", "no/such/file"], "there is no directory for no/such/file"),
        (["Hi", "--no-chat", "--system", "x"], "a system message has no place"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, chat_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", chat_model, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and err.count("\n") == 1


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no/such/model.gguf", "Hi"]) == 2
    assert "there is no model at 'no/such/model.gguf'" in capsys.readouterr().err


def test_a_file_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    for command in (["generate", str(tmp_path / "notes.txt"), "Hi"], ["verify", str(tmp_path)]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "Accepted: a directory with model.safetensors" in err and err.count("\n") == 1


@pytest.mark.parametrize("how", ["--tp", pytest.param("--pp", marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_command(chat_model: str, how: str) -> None:
    process = start(chat_model, "Hi", how, "2", "--max-new-tokens", "90000")
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.read(1)  # in the middle
        victims = child_ranks(process.pid)
        assert len(victims) == 2
        os.kill(victims[1], signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - killed < 20
    assert process.returncode == 1
    line = "colrow generate: rank 1 was killed by SIGKILL; the other ranks were stopped\n"
    assert err.decode() == line
    assert not any(Path(f"/proc/{pid}").exists() for pid in victims)


def test_a_reader_that_leaves_ends_the_command_without_a_word(chat_model: str) -> None:
    process = start(chat_model, "Hi", "--tp", "2", "--max-new-tokens", "90000")
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(timeout=60), err) == (1, b"")
    finally:
        process.kill()
        process.stderr.close()
