"""``python -m benchmarks.peers.overview FILE``: the README's table of a results.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = (
    ("train-256", "step_seconds", "training step, hidden 256"),
    ("train-1024", "step_seconds", "training step, hidden 1024"),
    ("decode-fp32", "token_seconds", "SmolLM2, a token, fp32"),
    ("decode-bf16", "token_seconds", "SmolLM2, a token, bf16"),
    ("decode-fp32", "first_token_seconds", "first token after 512, fp32"),
    ("decode-bf16", "first_token_seconds", "first token after 512, bf16"),
)
# Everybody as it comes: the peers on Gloo, colrow on the engine that it chooses here.
COLUMNS = (
    ("colrow", "mpi", "colrow, tp=2"),
    ("colrow-1", None, "colrow, unsplit"),
    ("unsplit", None, "PyTorch or transformers, unsplit"),
    ("dtensor", "gloo", "DTensor, tp=2"),
    ("megatron", "gloo", "Megatron-Core layers, tp=2"),
    ("transformers-3", "gloo", "transformers, tp=3"),
    ("deepspeed", "gloo", "DeepSpeed AutoTP, tp=2"),
)


def overview(results: Sequence[dict[str, Any]]) -> str:
    """Medians in milliseconds, the fastest marked; how many times faster colrow's two ranks are.

    The unsplit process's are of the race that colrow's engine took part in.

    Args:
        results: "results" of a results.json.
    """
    lines = [
        _row(["ms", *(heading for _, _, heading in COLUMNS)]),
        _row(["---"] * (1 + len(COLUMNS))),
    ]
    for workload, metric, heading in ROWS:
        races = [r["contestants"] for r in results if r["workload"]["name"] == workload]
        own = next((r for r in races if _median(r, "colrow", "mpi", metric)), [])
        ours = _median(own, "colrow", "mpi", metric)
        medians = []
        for name, engine, _ in COLUMNS:
            found = [_median(r, name, engine, metric) for r in (own, *races)]
            medians.append(next((value for value in found if value), None))
        fastest = min(value for value in medians if value)
        others = [None, *[ours] * (len(COLUMNS) - 1)]
        cells = [_cell(*values, fastest) for values in zip(medians, others, strict=True)]
        lines.append(_row([heading, *cells]))
    return "\n".join(lines)


def _median(
    race: Sequence[dict[str, Any]], name: str, engine: str | None, metric: str
) -> float | None:
    for contestant in race:
        if (contestant["name"], contestant["engine"]) == (name, engine):
            median: float | None = contestant["summary"].get(metric, {}).get("median")
            return median
    return None


def _cell(median: float | None, ours: float | None, fastest: float) -> str:
    if median is None:
        return "-"
    milliseconds = f"{1e3 * median:.0f}" if median >= 0.1 else f"{1e3 * median:.1f}"
    marked = f"**{milliseconds}**" if median == fastest else milliseconds
    return marked if ours is None else f"{marked} ({median / ours:.2f}x)"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(overview(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["results"]))
