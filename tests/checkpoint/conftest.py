"""A small model as transformers saves it, with a tokenizer and a chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.generation import models


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all tests: not to be changed."""
    directory = tmp_path_factory.mktemp("original") / "model"
    models.save_chat_model(directory)
    return directory


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(original, tmp_path / "model"))
