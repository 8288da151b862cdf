from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from colrow.cli import main


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from colrow.cli import main; "
        "assert main(['plan', 'llama-3-8b', '--tp', '8', '--gpu', 'h100', '--explain']) == 0; "
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TFLOP/s peak" in done.stdout


def test_a_search_says_what_why_and_why_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "llama-3-70b", "--gpus", "64", "--gpu", "h100", "--json", str(file)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "Use TP 1 × PP 1 × DP 64 + ZeRO-3",
        "of 80 GB per device",
        "Why:",
        "Why not:",
        "longer",
    ):
        assert expected in text
    data = json.loads(file.read_text())
    best = data["best"][0]
    assert best["step_seconds"] == pytest.approx(sum(best["step_breakdown_seconds"].values()))
    memory = sum(best["memory_breakdown_bytes"].values())
    assert best["memory_bytes_per_rank"] == pytest.approx(memory)


def test_a_given_layout_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    layout = (
        "--tp 8 --pp 8 --dp 1 --microbatch 1 --global-batch 64 --sequence 2048 --recompute "
        "selective --sequence-parallel --schedule interleaved --virtual-stages 3 --json -"
    )
    assert main(["plan", "gpt3-175b", "--gpu", "a100", *layout.split()]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["devices"] == 64 and data["layout"]["virtual_stages"] == 3
    assert data["step_breakdown_seconds"]["pp_bubble"] > 0


def test_what_does_not_fit_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt3-175b", "--gpus", "8"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits" in text and "What would fit:" in text and "instead of 8 devices" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("llama3-70 --gpus 8", "did you mean llama-3-70b"),
        ("llama-3-70b --gpus 0", "at least 1 device"),
        ("llama-3-70b --gpus 8 --global-batch -3", "global_batch=-3: must be at least 1"),
        ("llama-3-8b --tp 64 --gpu h100", "32 query heads cannot be split over 64 ranks"),
        ("llama-3-8b --tp 0", "tp=0: must be at least 1"),
        ("llama-3-8b --gpu h1000", "did you mean h100"),
        ("--hidden 100 --layers 2 --heads 3 --vocab 10", "not a multiple of num_heads=3"),
        ("", "name a model"),
        ("nofile.json", "No such file"),
        ("llama-3-8b --gpus 8 --microbatch 2", "--microbatch belongs to one layout"),
        ("llama-3-8b --tp 3 --gpus 8", "do not divide"),
        ("llama-3-8b --tp 2 --dp 2 --gpus 8", "but --gpus says 8"),
        ("llama-3-8b --inference --tensor-split a,b", "numbers with commas"),
        ("llama-3-8b --gpu v100 --tp 1", "has no bf16 matmul"),
        ("llama-3-8b --inference --batch 0", "batch=0"),
    ],
)
def test_nonsense_gives_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(["plan", *arguments.split()]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("colrow plan: ") and error.count("\n") == 1
    assert message in error


def test_what_would_fit_is_said_of_generation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt3-175b", "--inference", "--gpu", "a100", "--gpus", "1"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "Nothing fits on 1 device;" in text
    assert "8 devices would do: TP 8 × PP 1" in text
    assert "the parameters alone are 349 GB" in text


def test_quantised_weights_run_where_there_is_no_bf16() -> None:
    assert main(["plan", "llama-2-7b", "--inference", "--weights", "int4", "--gpu", "v100"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("gpt3-175b --inference --tp 8 --gpus 4", "4 devices do not divide by tp × pp = 8 × 1"),
        ("gpt2 --inference --tp 2 --dp 3 --gpus 8", "= 6, but --gpus says 8"),
        ("gpt2 --inference --plot plots", "--plot draws training layouts"),
        ("gpt2 --inference --offload-layers 2", "--offload-layers is about training"),
        ("gpt2 --inference --zero 0", "--zero is about training"),
        ("gpt2 --tensor-split 0.5,0.5 --explain", "--explain covers equal devices"),
        ("gpt2 --device-memory 24,-8", "device memory of 24, -8 GB"),
    ],
)
def test_options_of_generation_are_not_ignored(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_config_json_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["plan", str(tmp_path), "--inference", "--gpu", "h100", "--json", "-"]
    assert main([*arguments, "--tp", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parameters"] == 46_702_792_704
    assert data["active_parameters"] == 12_879_925_248


def test_lists_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list-models"]) == 0
    assert "bloom-176b" in capsys.readouterr().out


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "plots"
    assert main(["plan", "gpt2", "--gpus", "2", "--sequence", "512", "--plot", str(folder)]) == 0
    assert {file.name for file in folder.iterdir()} == {"memory.png", "time.png", "scaling.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--inference --schedule 1f1b", "--schedule is about training"),
        ("--inference --recompute full", "--recompute is about training"),
        ("--inference --sequence 2048", "--sequence is about training"),
        ("--device-memory 24,16 --zero 1", "--zero is about training"),
        ("--gpus 2 --pp 2 --schedule interleaved", "needs virtual_stages of at least 2"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "llama-2-7b", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
