"""Not a kind: what ranks can do wrong, for the tests of the fuzz itself."""

from __future__ import annotations

import os
import time

from tests.fuzz.case import Case, Fields, Kind, World


def run(world: World, case: Case) -> list[str]:
    if world.rank != 1 or case["does"] == "right":
        return []
    if case["does"] == "raises alone":
        raise ValueError("only here")
    if case["does"] == "hangs":
        time.sleep(60)
    if case["does"] == "dies":
        os._exit(3)
    return ["rank 1 says so"]


PRETENDED = Kind("pretended", lambda _: Fields({}), run)
