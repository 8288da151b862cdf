"""A case that failed, made as small as possible while it still fails."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.fuzz.case import Case, Fields


def shrunk(
    case: Case, fields: Fields, fails: Callable[[Case], bool], *, seconds: float, most: int = 150
) -> Case:
    """The smallest case that was found by simplifying one thing after the other.

    Args:
        fails: whether a case still fails in the same way.
        seconds, most: when to stop: time, and cases that are tried.
    """
    deadline, tried = time.monotonic() + seconds, 0
    known = {repr(case)}
    found = True
    while found:
        found = False
        for simpler in fields.simpler(case):
            if repr(simpler) in known:
                continue
            if time.monotonic() > deadline or tried == most:
                return case
            known.add(repr(simpler))
            tried += 1
            if fails(simpler):
                case, found = simpler, True
                break
    return case
