from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers.overview import overview

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_committed_results() -> None:
    results = json.loads((ROOT / "benchmarks/peers/results/results.json").read_text())
    table = overview(results["results"])
    assert table.count("x)") >= 10
    assert table in (ROOT / "README.md").read_text()
