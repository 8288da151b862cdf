"""Renders chat templates in a process of its own, which may take little time and memory.

A template is a program that came with a model. jinja2's sandbox keeps it from reaching anything,
but not from computing for hours or filling the memory (``10 ** 10 ** 7``, ``'x' * 10 ** 9``): what
does that is one operation of Python's, which nothing inside the same process can interrupt. So the
operating system does, and the process that asked stays what it was.

This file is run, not imported: ``python -I -S template_child.py SECONDS BYTES PATH...``, the paths
being those of jinja2 and markupsafe. Requests and answers are lines of JSON.

What a template finds is what transformers gives it: the tags ``generation``, ``break`` and
``continue``, the filter ``tojson`` that escapes nothing, ``raise_exception`` and ``strftime_now``.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

_TEMPLATE_CHARACTERS = 1 << 20


def main() -> None:
    """Answers requests until there are no more."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    sys.path[:0] = sys.argv[3:]
    environment, errors = _environment()
    _forbid(memory)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        try:
            answer = {"text": _render(environment, request)}
        except errors as error:
            answer = {"refused": str(error)[:500]}
        except MemoryError:
            answer = {"failed": "it needs too much memory"}
        except RecursionError:
            answer = {"failed": "it calls or nests itself too deeply"}
        except OverflowError:
            answer = {"failed": "it computes numbers or ranges that are too large"}
        except Exception as error:  # whatever a template's own operations raise
            answer = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        try:
            written = json.dumps(answer)
        except MemoryError:
            written = json.dumps({"failed": "it needs too much memory"})
        answers.write(written + "\n")
        answers.flush()


def _forbid(memory: int) -> None:
    """Nothing that a template could reach, were it to leave the sandbox, and not much memory."""
    _limit(resource.RLIMIT_AS, memory)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))


def _limit(kind: int, amount: int) -> None:
    """Lowers a limit, or raises it again, never beyond what this process was given."""
    hard = resource.getrlimit(kind)[1]
    soft = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (soft, hard))


def _render(environment: Any, request: dict[str, Any]) -> str:
    template, most = request["template"], request["characters"]
    if len(template) > _TEMPLATE_CHARACTERS:
        raise ValueError(f"it has {len(template)} characters, more than {_TEMPLATE_CHARACTERS}")
    written, total = [], 0
    for piece in environment.from_string(template).generate(**request["variables"]):
        total += len(piece)
        if total > most:
            raise ValueError(f"it writes more than {most} characters for these messages")
        written.append(piece)
    text = "".join(written)
    text.encode()  # half a surrogate pair is no text
    return text


def _environment() -> tuple[Any, type[Exception]]:
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}``, which marks an answer for training."""

        tags = {"generation"}  # noqa: RUF012 (as the base class has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

        def _as_it_is(self, caller: Any) -> Any:
            return caller()

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have an attribute {name!r}")

    class Attributes(Namespace):
        """``namespace(...)`` without names that start with an underscore."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            values = dict(*rest, **values)
            for name in values:
                check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    class Tables:
        """``dict``, of which a template can have tables and nothing of the type itself."""

        def __call__(self, *args: Any, **values: Any) -> Any:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> Any:
            return dict.fromkeys(*args)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        if options.keys() - {"indent", "separators", "sort_keys"}:
            raise TypeError(f"tojson takes no {sorted(options)}")
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = Tables()
    environment.globals["namespace"] = Attributes
    return environment, TemplateError


if __name__ == "__main__":
    main()
