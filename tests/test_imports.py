"""Imports point one way: no module is in a circle, and no room imports one that stands above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import colrow

# From the ground up. A module belongs to the room with the longest name that it begins with, and
# may import that room and those below.
ROOMS = (
    # Files that somebody else made, locks, who holds which indices; random numbers.
    "colrow._lazy",
    "colrow.text",
    "colrow.progress",
    "colrow.files",
    "colrow.leftovers",
    "colrow.partition",
    "colrow.head_partition",
    "colrow.sharding",
    "colrow.rng",
    # Ranks, and what goes between them.
    "colrow.launch",
    "colrow.comm",
    # Which parts of a model a rank holds; layers that hold them; models of such layers.
    "colrow.shards",
    "colrow.layers.options",
    "colrow.layers.describe",
    "colrow.layers",
    "colrow.models",
    "colrow.checkpoint",
    "colrow.optim",
    # The measure of a difference and the unsplit model; then what is compared by them.
    "colrow.verification.comparison",
    "colrow.verification.reference",
    "colrow.inplace.observe",
    "colrow.inplace.find",
    "colrow.inplace.apply",
    "colrow.inplace.weights",
    "colrow.inplace",
    # Tiny models of every architecture; then a model of any of them as the commands take it.
    "colrow.tiny_models",
    "colrow.any_model",
    # What is done with a model.
    "colrow.generation",
    "colrow.pipeline",
    "colrow.planner",
    "colrow.explain",
    "colrow.train",
    "colrow.bench",
    "colrow.verification",
    "colrow.transformers",
    "colrow.cli",
    "colrow",
)
Graph = dict[str, set[str]]


def imports(package: Path) -> Graph:
    """What each module of a package imports of it, inside functions and for types too."""
    files = {_name(file, package): file for file in package.rglob("*.py")}
    graph: Graph = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text())
        graph[module] = {found for found in _imported(tree, set(files)) if found != module}
    return graph


def _name(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield from {inner if inner in modules else node.module or ""} & modules
        elif isinstance(node, ast.Import):
            yield from {name.name for name in node.names} & modules


def circles(graph: Graph) -> list[list[str]]:
    """Ways around, until no circle is left when the last import of each is taken away."""
    left = {module: set(others) for module, others in graph.items()}
    found = []
    while left:
        if free := [module for module, others in left.items() if not others & left.keys()]:
            for module in free:
                del left[module]
            continue
        way = [min(left)]
        while (following := min(left[way[-1]] & left.keys())) not in way:
            way.append(following)
        around = way[way.index(following) :]
        found.append([*around, following])
        left[around[-1]].remove(following)
    return found


def arrows_up(graph: Graph) -> list[str]:
    """Imports of a room from one below it."""
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room(other) > room(module)
    ]


def room(module: str) -> int:
    """The number of the room, from the ground."""
    own = [name for name in ROOMS if f"{module}.".startswith(f"{name}.")]
    return ROOMS.index(max(own, key=len))


@pytest.fixture(scope="module")
def graph() -> Graph:
    found = imports(Path(colrow.__file__).parent)
    assert len(found) > 200
    return found


def test_no_circles(graph: Graph) -> None:
    assert circles(graph) == []


def test_rooms_import_those_below(graph: Graph) -> None:
    assert arrows_up(graph) == []


def test_every_module_has_a_room_of_its_own(graph: Graph) -> None:
    assert [m for m in graph if ROOMS[room(m)] == "colrow" and m != "colrow"] == []
    assert {ROOMS[room(module)] for module in graph} == set(ROOMS)


def test_planted_circles_and_arrows_are_found(tmp_path: Path) -> None:
    package = tmp_path / "colrow"
    for module, text in {
        "__init__": "",
        "comm/__init__": "",
        "comm/one": "def late() -> None:\n    from colrow.comm import two\n",
        "comm/two": "if TYPE_CHECKING:\n    import colrow.comm.one\n",
        "comm/three": "from colrow.layers.linear import Linear\n",
        "layers/linear": "from colrow.comm.one import late\n",
        "verification/reference": "from colrow.inplace import api\n",
        "inplace/api": "import colrow\n",
    }.items():
        file = package / f"{module}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    planted = imports(package)
    (around,) = circles(planted)
    assert set(pairwise(around)) == {
        ("colrow.comm.one", "colrow.comm.two"),
        ("colrow.comm.two", "colrow.comm.one"),
    }
    assert arrows_up(planted) == [
        "colrow.comm.three imports colrow.layers.linear",
        "colrow.inplace.api imports colrow",
        "colrow.verification.reference imports colrow.inplace.api",
    ]
