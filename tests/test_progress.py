from __future__ import annotations

import io

import pytest

from colrow.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_at_once_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    with Progress("reading a model", stream=terminal) as progress:
        assert terminal.getvalue() == "\r\x1b[K... reading a model"
        progress._since -= 61
        progress._write()
        assert terminal.getvalue().endswith("... reading a model 61 s")
        progress.say("x" * 90)
        assert len(terminal.getvalue().rpartition("\r\x1b[K")[2]) < 40
    assert terminal.getvalue().endswith("\r\x1b[K")
    length = len(terminal.getvalue())
    progress.end()
    assert len(terminal.getvalue()) == length and not progress._thread.is_alive()


def test_what_is_no_terminal_sees_nothing() -> None:
    for stream, active in ((io.StringIO(), True), (Terminal(), False)):
        with Progress("reading", active=active, stream=stream) as progress:
            progress.say("more")
            progress.hand_over()
        assert stream.getvalue() == ""
