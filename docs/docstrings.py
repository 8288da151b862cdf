"""For mkdocstrings: the docstrings' roles and tables, which Sphinx writes so, as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([^`]+)`")
_RULE = re.compile(r"^=+(?:  ?=+)+$")


class Markdown(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Takes one object's."""
        if obj.docstring is not None:
            obj.docstring.value = tables(_ROLE.sub(r"`\1`", obj.docstring.value))


def tables(text: str) -> str:
    """A text with its tables between rules of equal signs written with bars."""
    found: list[str] = []
    rules = 0
    columns: list[tuple[int, int | None]] = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if _RULE.match(line.strip()):
            rules = rules % 3 + 1
            starts = [match.start() + indent for match in re.finditer("=+", line.strip())]
            columns = list(zip(starts, [*starts[1:], None], strict=True))
            if rules == 2:
                found.append(" " * indent + "|" + "---|" * len(columns))
            continue
        if rules in (1, 2):
            cells = [line[start:end].strip().removeprefix("\\") for start, end in columns]
            line = " " * indent + "| " + " | ".join(cells) + " |"
        found.append(line)
    return "\n".join(found)
