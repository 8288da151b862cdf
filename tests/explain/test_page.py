"""The page says what the real layers hold and send."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from colrow.cli import main
from colrow.explain.holdings import Question, holdings, layers_text, traffic
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.models.hf_config import config_from_file
from colrow.planner.catalog import find_model
from colrow.verification.traffic import _pretended_group, dry_run


def cells(page: str) -> list[list[str]]:
    """The rows of all tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def pieces(page: str, rank: int) -> list[str]:
    """The tooltips of what is drawn in a rank's colour."""
    return re.findall(rf'<rect [^>]*data-rank="{rank}"[^>]*><title>(.*?)</title>', page)


def test_a_page_of_heads_that_do_not_divide(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    assert main(["explain", str(tiny_models / "qwen2"), "--tp", "2", "--html", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {file}: qwen2 over 2 ranks")
    page = file.read_text(encoding="utf-8")
    assert "http" not in page and "src=" not in page  # nothing to fetch
    config = config_from_file(tiny_models / "qwen2")
    question = Question("qwen2", config, config.divide(2))
    for rank, held in enumerate(holdings(question)):
        first, last = held.query_heads
        tips = pieces(page, rank)
        drawn = [tip for tip in tips if "query head " in tip]
        assert len(drawn) == last - first
        row = next(r for r in cells(page) if r[:1] == [str(rank)])
        assert row[5] == f"{held.parameters:,}"
    assert page.count('<button data-rank="') == 2
    assert len(re.findall(r">all-reduce</text>", page)) == 2 * len(question.kinds)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "mixtral", "gemma3"])
def test_what_is_shown_is_what_the_layers_hold_and_send(
    tiny_models: Path, name: str, sequence_parallel: bool
) -> None:
    config = config_from_file(tiny_models / name)
    question = Question(
        name,
        config,
        config.divide(3),
        sequence=12,
        sequence_parallel=sequence_parallel,
        dtype="float32",
    )
    for rank, held in enumerate(holdings(question)):
        with _pretended_group(rank, 3) as tp:
            model = Decoder(config, tp, device=torch.device("meta"))
        assert held.parameters == sum(parameter.numel() for parameter in model.parameters())
        first, last = held.vocabulary
        assert model.vocab.bounds[rank] == (first, last)
    recorded = dry_run(config, 3, batch=1, sequence=12, sequence_parallel=sequence_parallel)
    sent = traffic(question, 0)
    assert sent.calls == sum(int(str(row["count"])) for row in recorded.recorded)
    for phase, calls in (("forward", sent.forward), ("backward", sent.backward)):
        found = sorted((call.layer, call.op, call.bytes) for call in calls)
        assert found == sorted(
            (row["layer"], row["op"], row["bytes"])
            for row in recorded.recorded
            for _ in range(int(str(row["count"])))
            if row["phase"] == phase and str(row["layer"]).startswith("blocks.0.")
        )


def test_large_models_and_many_ranks(tmp_path: Path) -> None:
    """Experts, latent attention and KV heads that many ranks hold are drawn without their sizes."""
    from colrow.explain.page import write_page

    for name, ranks in (("deepseek-v3", 16), ("llama-3-70b", 16), ("gpt3-175b", 96)):
        config: ModelConfig = find_model(name).config
        file = tmp_path / f"{name}.html"
        write_page(file, Question(name, config, config.divide(ranks), sequence_parallel=True))
        page = file.read_text(encoding="utf-8")
        assert len(page) < 4e6
        assert pieces(page, ranks - 1)
    llama = (tmp_path / "llama-3-70b.html").read_text(encoding="utf-8")
    assert "8 KV heads are held by more than one rank" in llama
    assert "KV head 7, which 2 ranks hold" in llama


def test_numbers_of_layers() -> None:
    assert layers_text([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"


def test_a_page_needs_a_name_and_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["llama-3-8b"], "the following arguments are required: --html"),
        (["llama-3-8c", "--html", "x"], "did you mean"),
        (["llama-3-8b", "--html", "x", "--tp", "99"], "32 query heads cannot be split over 99"),
    ):
        assert main(["explain", *words]) == 2
        assert message in capsys.readouterr().err
