"""What importing costs, and what it offers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import colrow


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_importing_and_helping_need_no_torch() -> None:
    # What Python starts with counts nothing; typing alone takes longer than all the rest.
    code = (
        "import sys; before = set(sys.modules); import colrow; "
        "assert not {'torch', 'typing', 're'} & (set(sys.modules) - before); "
        "print(colrow.__version__)"
    )
    assert run(code) == colrow.__version__
    for arguments in (
        ["--help"],
        ["generate", "--help"],
        ["verify", "--help"],
        ["comms", "--help"],
    ):
        code = (
            "import sys\nfrom colrow.cli import main\n"
            f"assert main({arguments!r}) == 0\nassert 'torch' not in sys.modules"
        )
        assert "usage: colrow" in run(code)


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    root = Path(colrow.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "colrow.__version__"
    assert f"\n## [{colrow.__version__}] - 20" in (root / "CHANGELOG.md").read_text()
    # What base installs bring stays little, and every kind of data file is in the wheel.
    names = {re.split("[<>=]", name)[0] for name in project["project"]["dependencies"]}
    assert names == {"torch", "numpy", "safetensors", "rich"}
    kept = project["tool"]["setuptools"]["package-data"]["colrow"]
    others = (f for f in (root / "src").rglob("*.*") if f.suffix not in (".py", ".pyc"))
    data = [f.relative_to(root / "src" / "colrow") for f in others if "egg-info" not in str(f)]
    assert all(any(file.match(pattern) for pattern in kept) for file in data), data


def test_layers_do_not_import_what_takes_as_long_as_torch_itself() -> None:
    code = "import sys, colrow\ncolrow.ColumnParallelLinear, colrow.Decoder, colrow.init_mesh\n"
    code += "print([m for m in ('torch._dynamo', 'torch.distributed.tensor') if m in sys.modules])"
    assert run(code) == "[]"


def test_every_exported_name_is_there() -> None:
    for name in colrow.__all__:
        value = getattr(colrow, name)
        assert name == "__version__" or value.__name__ == name


def test_what_type_checkers_see_is_what_is_offered() -> None:
    """Every import of the package's source, each name once, and under its own name."""
    tree = ast.parse(Path(colrow.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    names = []
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        assert [alias.name for alias in node.names] == [alias.asname for alias in node.names]
        names += [alias.name for alias in node.names]
    assert sorted([*names, "__version__"]) == colrow.__all__
    assert len(set(names)) == len(names)
    assert set(names) <= set(dir(colrow))
    assert set(run("from colrow import *; print(*dir())").split()) >= set(names)
    with pytest.raises(AttributeError, match="'colrow' has no attribute 'nothing'"):
        _ = colrow.nothing
