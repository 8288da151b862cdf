from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest

from colrow.train.tokens import Encoded, write_tokens


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's help topics as bytes; every third token does not count, as a prompt's would not."""
    path = tmp_path_factory.mktemp("tokens") / "topics"
    text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[:20000]
    ids = list(text.encode())
    write_tokens(path, [Encoded(ids, [i % 3 > 0 for i in range(len(ids))])], vocab_size=257)
    return path
