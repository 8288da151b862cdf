"""The page of a plan."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from colrow.cli import main
from colrow.pipeline.schedules import bubble_fraction, simulate
from colrow.planner import Layout
from colrow.planner.orders import pipeline_order


class _Balanced(HTMLParser):
    """Raises when tags are not closed in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _page(path: Path) -> str:
    text = path.read_text()
    parser = _Balanced()
    parser.feed(text)
    assert not parser.open and not parser.sources and "http" not in text
    return text


def test_a_search_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.html"
    assert main(["plan", "llama-3-8b", "--gpus", "8", "--gpu", "h100", "--html", str(file)]) == 0
    page = _page(file)
    considered = int(re.findall(r"Layouts considered: (\d+)", page)[0])
    assert page.count("<circle") == considered > 50
    for expected in ("Memory of each", "One step over the devices", "other numbers of devices"):
        assert expected in page
    capsys.readouterr()


def test_a_given_layout_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.html"
    layout = "--tp 2 --pp 4 --global-batch 8 --gpu h100"
    assert main(["plan", "llama-3-8b", *layout.split(), "--html", str(file)]) == 0
    page = _page(file)
    for kind in ("forward", "backward"):
        assert page.count(f"<title>{kind} of microbatch") == 4 * 8
    assert main(["plan", "llama-3-8b", "--inference", "--html", str(file)]) == 2
    assert "--html draws training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "chunks", "bubble"),
    [("gpipe", 1, 3 / 11), ("1f1b", 1, 3 / 11), ("interleaved", 2, 3 / 19)],
)
def test_drawn_schedules_have_the_papers_bubbles(schedule: str, chunks: int, bubble: float) -> None:
    """(p-1)/(m+p-1) of the time, over m v + p - 1 turns when interleaved: Narayanan et al. 2021."""
    layout = Layout(pp=4, global_batch=8, schedule=schedule, virtual_stages=chunks)  # type: ignore[arg-type]
    order = pipeline_order(layout)
    assert order is not None
    spans = simulate(order, lambda action: 1.0 if action.kind == "forward" else 2.0)
    assert all(len(row) == 2 * 8 * chunks for row in spans)
    assert bubble_fraction(spans) == pytest.approx(bubble)
    assert pipeline_order(Layout(pp=4, global_batch=8, schedule="zb-h1")) is None
