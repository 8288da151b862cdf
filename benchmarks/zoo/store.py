"""Outcomes kept in a file, line by line, so that a run that was stopped can go on."""

from __future__ import annotations

import json
from pathlib import Path

from colrow.files import read_text
from colrow.text import lines
from colrow.tiny_models.architectures import Architecture
from colrow.verification.in_place import Outcome


class Store:
    """The outcomes of a run, in a file of one JSON object a line.

    Args:
        path: a file that need not be there yet; None keeps nothing.

    Raises:
        ValueError: when the file holds anything but outcomes.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[tuple[str, str, bool, int], Outcome] = {}
        if path is None or not path.exists():
            return
        for number, line in enumerate(lines(read_text(path)), 1):
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not an outcome of colrow zoo ({error}); name a file "
                    "that --resume wrote, or a new one"
                ) from None
            self._known[_key(outcome)] = outcome

    def find(self, architecture: Architecture, system: str, tp: int) -> Outcome | None:
        """What an earlier run found for this architecture."""
        return self._known.get((architecture.name, system, architecture.even, tp))

    def add(self, outcome: Outcome) -> None:
        """Writes an outcome at once."""
        self._known[_key(outcome)] = outcome
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome.as_dict()) + "\n")


def _key(outcome: Outcome) -> tuple[str, str, bool, int]:
    return outcome.name, outcome.system, outcome.even, outcome.tp
