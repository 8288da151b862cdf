"""Files of strangers: what is opened and what is not, and how much JSON and TOML may hold."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from colrow.files import (
    check_inside,
    check_regular,
    member,
    parse_json,
    parse_toml,
    read_bytes,
    read_input,
    read_json,
    shown,
)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_out(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_text("secret")
    path.symlink_to(outside)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        server.bind(path.name)
        os.chdir(here)


BAD: list[tuple[Callable[[Path], None], str]] = [
    (Path.mkdir, "is a directory, not a regular file"),
    (pipe, "is a named pipe, not a regular file"),
    (listening, "is a socket, not a regular file"),
    (link_out, "leads out of the model's directory, to .*outside"),
    (link_to_device, "leads out of the model's directory, to /dev/zero"),
    (circle, "cannot be read|leads out"),
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.mark.parametrize(("make", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_no_file_of_the_directory(
    make: Callable[[Path], None], message: str, home: Path
) -> None:
    make(home / "x")
    with pytest.raises(ValueError, match=message):
        check_inside(home / "x", home)
    with pytest.raises(ValueError, match=f"index names 'x': .*({message})"):
        member(home, "x", Path("index"))


def test_a_device_and_what_a_shell_opens(home: Path) -> None:
    with pytest.raises(ValueError, match="/dev/zero is a device"):
        check_regular("/dev/zero")
    with pytest.raises(ValueError, match="is a device"):
        read_input("/dev/zero")
    pipe(home / "pipe")
    with pytest.raises(ValueError, match="is a named pipe"):
        read_input(home / "pipe")
    reading, writing = os.pipe()
    os.write(writing, b"from the shell")
    os.close(writing)
    assert read_input(f"/dev/fd/{reading}") == b"from the shell"
    os.close(reading)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "..", "a//b", "./x", "x\0y", 7, None, ["x"]],
    ids=repr,
)
def test_names_that_lead_out(name: object, home: Path) -> None:
    (home.parent / "x").write_text("")
    (home / "x").write_text("")
    with pytest.raises(ValueError, match=r"index names .*, which is not the name of a file in"):
        member(home, name, Path("index"))


def test_files_that_are_inside(home: Path) -> None:
    (home / "a").mkdir()
    (home / "a" / "x").write_text("")
    (home / "link").symlink_to("a/x")
    assert member(home, "a/x", Path("index")) == home / "a" / "x"
    assert member(home, "link", Path("index")) == home / "link"
    other = home.parent / "other"
    other.symlink_to(home)
    assert member(other, "link", Path("index")) == other / "link"
    with pytest.raises(FileNotFoundError):
        member(home, "y", Path("index"))


def test_the_hub_cache_is_made_of_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "sub"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ff").write_text("")
    (snapshot / "x").symlink_to("../../../blobs/ff")
    assert member(snapshot.parent, "sub/x", Path("index")) == snapshot / "x"
    check_inside(snapshot / "x", snapshot)
    (blobs / "out").symlink_to("/etc/hostname")
    (snapshot / "y").symlink_to("../../../blobs/out")
    (snapshot / "z").symlink_to("../../../refs")
    (tmp_path / "models--a--b" / "refs").write_text("")
    for name in ("y", "z"):
        with pytest.raises(ValueError, match="leads out of the model's directory"):
            check_inside(snapshot / name, snapshot)


def test_sizes(home: Path) -> None:
    (home / "x").write_bytes(b"12345")
    assert read_bytes(home / "x", 5) == b"12345"
    with pytest.raises(ValueError, match=r"x is larger than 4 bytes \(5\)"):
        read_bytes(home / "x", 4)
    with (home / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="large is larger than"):
        read_json(home / "large")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"a":' * 100_000, "nested more than 100 deep"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ('{"a": 1, "b": 2, "a": 1}', "has the key 'a' twice"),
        ("9" * 1_000_000, "a whole number of 1000000 digits"),
        ("-" + "9" * 5_000, "a whole number of 5001 digits"),
        ("[" + "[]," * 400_000 + "1]", "holds more lists, tables or values"),
        ("[" + "1," * 1_000_001 + "1]", "holds more lists, tables or values"),
        ("{", "Expecting property name"),
    ],
    ids=lambda text: text[:10],
)
def test_json_that_is_refused(text: str, message: str, home: Path) -> None:
    (home / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json is not JSON that can be read: .*{message}"):
        read_json(home / "x.json")


def test_json_that_is_read() -> None:
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json('{"a": [1, -2.5, 1000000000000000019884624838656, null, true, "x[{"]}') == {
        "a": [1, -2.5, int(1e30), None, True, "x[{"]
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 100_000, "nested more than 100 deep"),
        ("a = " + "{a=" * 50_000, "nested more than 100 deep"),
        ("a." * 50_000 + "b = 1", "a key of more than 32 parts"),
        ("'a' . \"b c\" ." * 30 + "b = 1", "a key of more than 32 parts"),
        ("[" + "a." * 50_000 + "b]", "a key of more than 32 parts"),
        ("x = { " + "a." * 50_000 + "b = 1 }", "a key of more than 32 parts"),
        ("a = " + "9" * 100_000, "a whole number of 100000 digits"),
    ],
    ids=lambda text: text[:10],
)
def test_toml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_toml(text)


def test_toml_that_is_read() -> None:
    text = "a.b.c = [[1.5, 2e-3], [0.5, 1_000]]\n[d]\ne = '''...." + "." * 100 + "'''"
    assert parse_toml(text)["a"]["b"]["c"] == [[1.5, 2e-3], [0.5, 1000]]


def test_values_in_messages_are_short() -> None:
    assert len(shown("x" * 1000)) < 90
    assert shown(10**1_000_000) == "a whole number of 3321929 bits"
    assert shown(4.0) == "4.0"
