"""Chat templates, rendered where they can harm nothing: see ``template_child.py``."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from colrow.files import shown

SECONDS = 1
"""Processor time for one conversation, up to one more; templates need some milliseconds."""
WALL_SECONDS = 30
"""The same by the clock, on a machine that is busy with other things."""
_MEMORY_BYTES = 256 << 20
_CHARACTERS, _CHARACTERS_EACH = 1 << 20, 16  # of text: at least, and for each one of the messages
_BLOCK = 1 << 16


class TemplateRenderer:
    """A process that renders chat templates, started when it is first needed.

    Conversations that come from several threads are rendered one after the other.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, object]) -> str:
        """The text of a conversation.

        Args:
            template: what the model came with.
            variables: what the template may use, as JSON has it.

        Raises:
            ValueError: the template refuses the messages, makes no sense, or takes more than
                one or two seconds, 256 MB or 16 characters of text for each one of the messages.
        """
        most = _CHARACTERS + _CHARACTERS_EACH * len(json.dumps(variables))
        request = {"template": template, "variables": dict(variables), "characters": most}
        with self._lock:
            answer = self._ask(json.dumps(request).encode() + b"\n", limit=8 * most)
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise ValueError(f"the model's chat template refuses the messages: {answer['refused']}")
        raise ValueError(f"the model's chat template cannot be used: {answer['failed']}")

    def close(self) -> None:
        """Ends the process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _ask(self, request: bytes, limit: int) -> dict[str, str]:
        child = self._started()
        try:
            line = _exchange(child, request, limit)
        except TimeoutError:
            self.close()
            return {"failed": f"it has not ended after {WALL_SECONDS} seconds"}
        except BaseException:
            self.close()
            raise
        if line.endswith(b"\n"):
            answer: dict[str, str] = json.loads(line)
            return answer
        if len(line) > limit:
            self.close()
            return {"failed": "it writes too much for these messages"}
        code = child.wait()
        self.close()
        if code == -24 or code == -9:  # SIGXCPU, or the kernel's own end of it
            return {"failed": f"it computes for more than {SECONDS} s"}
        return {"failed": f"it ended the process that renders it ({shown(code)})"}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        import jinja2
        import markupsafe

        paths = [str(Path(str(module.__file__)).parent.parent) for module in (jinja2, markupsafe)]
        script = Path(__file__).with_name("template_child.py")
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), str(SECONDS), str(_MEMORY_BYTES), *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={key: os.environ[key] for key in ("TZ", "LC_ALL", "LANG") if key in os.environ},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for who asked
        )
        return self._child


def _exchange(child: subprocess.Popen[bytes], request: bytes, limit: int) -> bytes:
    """Writes a request while reading what comes back, up to a line's end, the limit or the end."""
    assert child.stdin is not None and child.stdout is not None
    source, sink = child.stdout.fileno(), child.stdin.fileno()
    os.set_blocking(sink, False)
    left, found = memoryview(request), bytearray()
    deadline = time.monotonic() + WALL_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        selector.register(sink, selectors.EVENT_WRITE)
        while True:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                if key.fd == source:
                    block = os.read(source, _BLOCK)
                    found += block
                    if not block or block.endswith(b"\n") or len(found) > limit:
                        return bytes(found)
                elif left:
                    try:
                        left = left[os.write(sink, left[:_BLOCK]) :]
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(sink)


RENDERER = TemplateRenderer()
"""The process's own; it ends with the process, whose end closes its pipe."""
