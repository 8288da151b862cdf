"""What ranks do that leave others waiting; apart, so that they import little to do it."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import torch

import colrow
from colrow.comm import primitives


def late(engine: str) -> None:
    mesh = colrow.init_mesh(tp=2, device="cpu", engine=engine, timeout=timedelta(seconds=3))
    if mesh.tp.rank == 1:
        time.sleep(60)
    primitives.all_reduce(torch.ones(5), mesh.tp)


def dies(engine: str) -> None:
    mesh = colrow.init_mesh(tp=2, device="cpu", engine=engine)
    primitives.all_reduce(torch.ones(5), mesh.tp)
    if mesh.tp.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    primitives.all_reduce(torch.ones(5), mesh.tp)
