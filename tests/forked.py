"""Ranks that are forked from a server which has imported what they need.

An interpreter of its own, with torch, transformers and colrow, takes a rank two to four seconds of
computing. The pool's ranks (:mod:`tests.ranks`) come from the server, and so do those of
:func:`colrow.launch.launch` in a test, but for tests that are marked ``new_interpreters``. Such a
rank takes over what a new process would inherit: the environment, standard output and error.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.reduction import DupFd
from typing import Any

from colrow.launch.environment import inherited_environment  # the same care for OMP_NUM_THREADS

_PRELOADED = [
    "pytest",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "colrow.pipeline.runner",
    "colrow.train.loop",
    "colrow.verification.in_place",
    "colrow.verification.verify",
    "tests.devices",
]
# Whether launch() forks: as the test that runs asks for.
launch_forks = False


def start_server() -> None:
    """Starts the server, if it does not run yet."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with inherited_environment({"OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()


def fork_launched_ranks() -> None:
    """From now on launch() forks its ranks while ``launch_forks`` is set."""
    from colrow.launch import agent

    started = agent._Agent._start_workers

    def start(self: Any, worker_group: Any) -> Any:
        spec = worker_group.spec
        if launch_forks:
            start_server()
            self._start_method = "forkserver"
            if spec.entrypoint is agent.run_rank:
                spec.entrypoint, spec.args = _run, (_Inherited(), *spec.args)
        return started(self, worker_group)

    agent._Agent._start_workers = start  # type: ignore[method-assign]


def in_another_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, of the top level of a module, in a process that ends then."""
    start_server()
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


class _Inherited:
    """Turns the process that unpickles it into a child of the one that pickled it."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return _inherit, (dict(os.environ), DupFd(1), DupFd(2))


def _inherit(environment: dict[str, str], out: Any, error: Any) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    for number, theirs in ((1, out), (2, error)):
        os.dup2(theirs.detach(), number)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


def _run(_: None, *args: Any) -> bytes:
    from colrow.launch.process import run_rank

    return run_rank(*args)
