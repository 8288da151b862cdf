"""``python -m benchmarks.peers.revisions BEFORE``: colrow as it is against a commit before it.

From the repository's root, on a machine that does nothing else. The two trees race in turns, each
beside the unsplit process of its own runs, whose ratio shows what the machine itself did between.
Writes every run's samples and the ratios into one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TREES = ("before", "after")
CONTESTANTS = ("colrow-1", "colrow", "colrow-sp")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.revisions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--workloads, --turns and --engines go to python -m benchmarks.peers.",
        allow_abbrev=False,
    )
    parser.add_argument("before", metavar="BEFORE", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tree (default 3)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args, peers = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(args.before, args.rounds, peers, Path(scratch))
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["ratios"]))


def measure(revision: str, rounds: int, peers: list[str], scratch: Path) -> dict[str, Any]:
    """Races both trees ``rounds`` times, the order of the two changing."""
    here, there = Path.cwd(), scratch / "before"
    _git("worktree", "add", "--detach", str(there), revision)
    try:
        for name in (".venv", ".cache"):
            (there / name).symlink_to((here / name).resolve())
        trees = {"before": there, "after": here}
        runs: list[dict[str, Any]] = []
        for number in range(rounds):
            for tree in TREES if number % 2 == 0 else TREES[::-1]:
                print(f"round {number + 1} of {rounds}: {tree}", file=sys.stderr, flush=True)
                runs.append({"tree": tree, **_run(trees[tree], peers, scratch / "results")})
    finally:
        _git("worktree", "remove", "--force", str(there))
    commits = {"before": _git("rev-parse", revision), "after": _git("rev-parse", "HEAD")}
    return {"commits": commits, "ratios": ratios(runs), "runs": runs}


def ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each contestant and metric both trees' medians of the runs' medians, and after / before.

    Seconds: below 1 is faster than before.
    """
    medians: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for run in runs:
        for key, seconds in _medians(run["results"]):
            medians.setdefault(key, {}).setdefault(run["tree"], []).append(seconds)
    found = []
    for (workload, contestant, engine, metric), by_tree in medians.items():
        before, after = (statistics.median(by_tree[tree]) for tree in TREES)
        row = {"workload": workload, "contestant": contestant, "engine": engine, "metric": metric}
        found.append({**row, "before": before, "after": after, "ratio": after / before})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The ratios in Markdown, in milliseconds."""
    lines = ["| workload | contestant | engine | before | after | after / before |"]
    lines.append("| --- " * 6 + "|")
    for row in rows:
        what = f"{row['workload']} {row['metric'].removesuffix('_seconds').replace('_', ' ')}"
        cells = [what, row["contestant"], row["engine"] or "-"]
        cells += [f"{1e3 * row[tree]:.1f}" for tree in TREES] + [f"{row['ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _medians(results: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, ...], float]]:
    for workload in results:
        for contestant in workload["contestants"]:
            for metric, summary in contestant["summary"].items():
                key = (workload["workload"]["name"], contestant["name"], contestant["engine"] or "")
                yield (*key, metric), summary["median"]


def _run(tree: Path, peers: list[str], output: Path) -> dict[str, Any]:
    command = [".venv/bin/python", "-m", "benchmarks.peers", "--contestants", *CONTESTANTS]
    subprocess.run(
        [*command, *peers, "--output", str(output)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": "src"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
