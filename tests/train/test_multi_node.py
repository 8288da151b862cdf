"""``colrow train`` under torchrun's agents on two hosts, one of which dies and comes back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hosts import OneHost, TwoHosts, kill_tree
from tests.train.curves import OPTIONS, write_inputs
from tests.train.test_faults import Run, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 40
SCRIPTS = Path(__file__).parents[2] / "examples" / "multi_node"


class Agent:
    """The script of docs/multi_node.md on one of the hosts."""

    def __init__(
        self, hosts: TwoHosts | OneHost, host: int, directory: Path, options: dict[str, Any]
    ):
        words = ["--model", directory / "config.json", "--data", directory / "topics.txt"]
        words += ["--output", directory / "run", "--token-cache", directory / "tokens"]
        for name, value in {**OPTIONS, **options}.items():
            option = "--" + name.replace("_", "-")
            words += [option] if value is True else [option, value]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            hosts.command(host, ["sh", str(SCRIPTS / "host.sh"), *map(str, words)]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PATH": path,
                "OMP_NUM_THREADS": "1",
                "HEAD": hosts.head,
                "PORT": str(hosts.port),
                "HOSTS": "2",
                "RANKS": "2",
            },
        )
        self.lines: list[str] = []
        self._over = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def until(self, pattern: str, seconds: float = 240) -> str:
        """Waits for a line that matches."""

        def matching() -> str | None:
            return next((line for line in self.lines if re.search(pattern, line)), None)

        with self._news:
            self._news.wait_for(lambda: matching() or self._over, seconds)
            found = matching()
        assert found is not None, f"no line matches {pattern!r}"
        return found

    def end(self, seconds: float = 240) -> int:
        """Waits for its end; its exit code."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code


@pytest.fixture(params=["namespaces", "launchers"])
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TwoHosts | OneHost]:
    """Two hosts, or two launchers on one, which any machine permits."""
    if request.param == "launchers":
        yield OneHost()
        return
    made = TwoHosts(tmp_path)
    try:
        made.start()
    except OSError as error:
        pytest.skip(f"this machine has no network namespaces for tests: {error}")
    yield made
    made.close()


def test_a_host_that_dies_comes_back_and_the_run_ends_as_if_nothing_had_happened(
    hosts: TwoHosts | OneHost, tmp_path: Path
) -> None:
    """A stage on each host, tensor-parallel inside it."""
    write_inputs(tmp_path)
    options: dict[str, Any] = {"tp": 2, "pp": 2, "steps": STEPS, "save_every": 2, "keep": 2}
    alone = Run(tmp_path, "alone", **options, engine="gloo")
    assert alone.end() == 0
    agents = [Agent(hosts, 0, tmp_path, options)]
    try:
        hosts.ready()
        agents.append(Agent(hosts, 1, tmp_path, options))
        agents[0].until(r"step 7/")
        kill_tree(agents[1].process)
        agents[1] = Agent(hosts, 1, tmp_path, options)
        again = agents[0].until(r"continuing after step \d+")
        assert int(re.findall(r"step (\d+)", again)[0]) >= 4
        assert [agent.end() for agent in agents] == [0, 0]
    finally:
        for host, agent in enumerate(agents):
            kill_tree(agent.process)
            print(f"--- host{host} ---", *agent.lines, sep="\n")  # shown when the test fails
    expected, found = weights(tmp_path / "alone", STEPS), weights(tmp_path / "run", STEPS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    def losses(output: str) -> list[tuple[int, float]]:
        lines = (tmp_path / output / "log.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"]) for r in map(json.loads, lines[1:])]

    assert losses("run") == losses("alone")
