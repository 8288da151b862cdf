"""What can go wrong with many ranks: stopping, disagreeing, numbers that are not finite."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from colrow.comm.compat import local_tensor
from colrow.comm.mesh import Mesh
from colrow.launch.environment import inherited_environment
from colrow.leftovers import lock, unlock
from colrow.train.settings import TrainSettings

T = TypeVar("T")
_HOLDER = "COLROW_OUTPUT_HELD"  # in the environment of ranks: the directory that is locked for them

_SECONDS_OF_ONE_REQUEST = 2.0


class StopRequest:
    """Whether SIGTERM or SIGINT asked this rank to stop; ``name`` is the signal's."""

    def __init__(self) -> None:
        self.name, self.seconds = "", 0.0

    def __bool__(self) -> bool:
        return bool(self.name)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside it the first SIGTERM or SIGINT only sets the request; a later one does as before.

    Ctrl-C comes twice, from the terminal and from the process that started the ranks.
    """
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: FrameType | None) -> None:
        if not request:
            request.name, request.seconds = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - request.seconds > _SECONDS_OF_ONE_REQUEST:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def output_held(settings: TrainSettings, active: bool = True) -> Iterator[None]:
    """Inside it no other run may train into this output; ranks whose launcher holds it may.

    Raises:
        ValueError: when another run does.
    """
    output = Path(settings.output)
    if not active or os.environ.get(_HOLDER) == str(output.absolute()):
        yield
        return
    lock(output, "train in another --output")
    try:
        with inherited_environment({_HOLDER: str(output.absolute())}):
            yield
    finally:
        unlock(output)


def check_agreement(values: Mapping[str, object], mesh: Mesh) -> None:
    """Compares these values over all ranks.

    Raises:
        ValueError: on every rank, naming the first value that differs and the ranks.

    Communicates: gathers the values on every rank.
    """
    everyone = _gather({name: repr(value) for name, value in values.items()}, mesh)
    for name, expected in everyone[0].items():
        others = {rank: found.get(name) for rank, found in enumerate(everyone)}
        different = [rank for rank, value in others.items() if value != expected]
        if different:
            raise ValueError(
                f"the ranks disagree on {name}: rank 0 has {expected}, rank {different[0]} has "
                f"{others[different[0]]}; give all ranks the same settings and the same data"
            )


def not_finite(
    step: int, loss: float, model: nn.Module, microbatch_losses: list[float], mesh: Mesh
) -> str:
    """Why a step's loss or gradients are not finite: the first cause, and the rank that has it.

    Communicates: gathers a line from every rank; all must call it.
    """
    mine = ""
    bad = [i for i, value in enumerate(microbatch_losses) if not math.isfinite(value)]
    if bad:
        mine = f"the loss of its microbatch {bad[0]} is {microbatch_losses[bad[0]]}"
    else:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                wrong = ~torch.isfinite(local_tensor(parameter.grad))
                if wrong.any():
                    mine = f"{int(wrong.sum())} elements of the gradient of {name} are not finite"
                    break
    found = _gather(mine, mesh)
    causes = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text]
    losses = [text for text in causes if "the loss of" in text]
    cause = (losses or causes or ["no rank has such a value any more"])[0]
    return (
        f"step {step}: the loss is {loss:.6g} and not all numbers are finite ({cause}). Nothing of "
        "this step was saved; lower the learning rate, clip, or look at the data of this step"
    )


def _gather(value: T, mesh: Mesh) -> list[T]:
    """Every rank's value, by rank."""
    world = mesh.world
    found = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(found, value, group=world.group)
    return found
