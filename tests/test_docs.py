"""The documentation is true: its links lead somewhere, its commands parse, its code runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.cli import _parser
from colrow.verification.reference import quiet_transformers
from tests.ranks import run_world

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "README.md",
]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Blocks that show a part of something else; what is around them is tested where it stands.
PARTS = {
    "docs/adding_a_family.md": "a part of a file of colrow",
    "docs/parallelize.md": "alternatives to each other, in tests/inplace/weights/test_meta.py",
    "docs/pipelines.md": "a part of a pipeline, in tests/pipeline/test_runs.py",
    "docs/training.md": "a part of a layer, in tests/train/test_own_layers.py",
}
METAVARS = {"N": "2", "D": "fp32"}
STAND_INS = {
    "path/or/file.gguf": "model",
    "model.gguf": "model",
    "path/to/model": "model",
    "4093, 198, 26843, 2": "5, 6, 7, 2",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind in languages]


def anchors(page: Path) -> set[str]:
    """The headings as GitHub and mkdocs name them."""
    text = BLOCK.sub("", page.read_text())
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link} in {name_of(page)}"
        if anchor:
            assert anchor in anchors(target), f"{link} in {name_of(page)}"


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = 0
    for page in PAGES:
        for text in blocks(page, "", "bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if re.match(r"colrow \S", line) else []
                if not words or "..." in words or "|" in words:
                    continue
                for word in words:
                    if "/" in word and not word.startswith("-"):
                        Path(word).parent.mkdir(parents=True, exist_ok=True)
                words = words[1 : words.index("<") if "<" in words else None]
                words = [METAVARS.get(word, word) for word in words]
                try:
                    _parser(words).parse_args(words)
                except SystemExit:
                    pytest.fail(f"{name_of(page)}: {line}")
                seen += 1
    assert seen > 25


def test_the_reference_has_every_public_name_once() -> None:
    documented: list[str] = []
    for page in (ROOT / "docs" / "api").glob("*.md"):
        documented += re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    for path in documented:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path
    names = [path.rpartition(".")[2] for path in documented]
    assert len(names) == len(set(names))
    assert set(colrow.__all__) - {"__version__"} <= set(names)


def test_the_menu_leads_somewhere() -> None:
    menu = re.findall(r"^ +- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert len(menu) > 30 and set(menu) <= pages | {"index.md"}


def run_blocks(pages: list[tuple[str, str]]) -> list[str]:
    """Runs the code of each page in a namespace of its own; returns those that ran."""
    for name, text in pages:
        namespace: dict[str, Any] = {"__name__": "docs"}
        try:
            exec(compile(text, name, "exec"), namespace)
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
    return [name for name, _ in pages]


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "llama",
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=24,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    pages = []
    for page in PAGES:
        text = "\n".join(blocks(page, "python"))
        for shown, meant in STAND_INS.items():
            text = text.replace(shown, meant)
        if text and name_of(page) not in PARTS:
            pages.append((name_of(page), text))
    assert len(pages) >= 7
    ran = run_world(2, run_blocks, pages, timeout=200)
    assert ran[0] == [name for name, _ in pages]
