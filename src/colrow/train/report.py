"""What a person sees of a run: a line, logs for programs and TensorBoard, a plot."""

from __future__ import annotations

import json
import math
import resource
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from colrow.comm.mesh import Mesh
from colrow.files import read_text
from colrow.text import lines
from colrow.train.bar import Bar
from colrow.train.step import StepResult

LOG = "log.jsonl"
_LOG_BYTES = 256 << 20
_COLUMNS = 80


@dataclass(frozen=True)
class StepRecord:
    """One line of the log.

    Attributes:
        step: steps taken so far.
        loss: of the last step, per token.
        learning_rate, grad_norm: of the last step; there is no norm when its fp16 gradients
            overflowed and it was skipped.
        tokens_per_second: that count in the loss, over all ranks.
        step_seconds: mean since the line before.
        communication_share: of the step's time, spent waiting for tensor-parallel collectives.
        mfu: model FLOPs over the devices' peak; None where the peak is not known.
        memory_bytes: peak of this rank's device, or of its process on a CPU.
        eval_loss: on held-out text, where it was measured.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens_per_second: float
    step_seconds: float
    communication_share: float
    mfu: float | None
    memory_bytes: int
    eval_loss: float | None = None

    def line(self, steps: int) -> str:
        """For a file or a narrow terminal; what does not fit is in the log alone."""
        parts = [
            f"loss {self.loss:.4f}",
            f"lr {self.learning_rate:.1e}",
            f"{self.tokens_per_second:,.0f} tokens/s",
            f"{self.memory_bytes / 1e9:.2f} GB",
            f"{self.communication_share:.0%} in comms",
            f"{self.step_seconds:.3f} s/step",
        ]
        if self.mfu is not None:
            parts.insert(4, f"MFU {self.mfu:.1%}")
        if self.grad_norm is None:
            parts.insert(0, "skipped: overflow")
        text = f"step {self.step}/{steps}"
        for part in parts:
            if len(text) + len(part) + 2 <= _COLUMNS:
                text += f"  {part}"
        return text


class Reporter:
    """Writes records on rank 0; does nothing on the others.

    A terminal gets one line that moves, anything else a line for each record.

    Args:
        directory: of the run; gets ``log.jsonl`` and TensorBoard's files where it is installed.
        first_step: lines of the log beyond it are of a run that died after its last checkpoint,
            and are removed.
    """

    def __init__(self, directory: Path, steps: int, *, first_step: int, active: bool) -> None:
        self._directory, self._steps, self._active = directory, steps, active
        self._board: Any = None
        self._log: IO[str] | None = None
        self._bar = Bar(steps)
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_log(directory) if first_step and r["step"] <= first_step]
        part = directory / f"{LOG}.part"
        part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        part.replace(directory / LOG)
        self._log = (directory / LOG).open("a", encoding="utf-8")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard import SummaryWriter

                # TensorBoard forgets what an earlier part of the run wrote from this step on.
                purged = first_step + 1 if first_step else 0
                self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purged)
        except ImportError:
            self.say("TensorBoard is not installed: only log.jsonl is written")

    def say(self, text: str) -> None:
        """A line for the person."""
        if self._active:
            self._bar.say(text)

    def begin(self, eval_loss: float) -> None:
        """Logs the loss on held-out text before the first step, as of step 0."""
        self.say(f"held-out loss before training {eval_loss:.4f}")
        self._write({"step": 0, "eval_loss": eval_loss})

    def advance(
        self, step: int, result: StepResult, rate: float, seconds: float, memory: int
    ) -> None:
        """Moves the line of a terminal on."""
        if self._active:
            self._bar.advance(
                step,
                loss=result.loss,
                rate=rate,
                tokens=result.tokens,
                seconds=seconds,
                memory=memory,
            )

    def add(self, record: StepRecord) -> None:
        """Prints and logs a record."""
        if not self._bar.shown:
            self.say(record.line(self._steps))
        if record.eval_loss is not None:
            self.say(f"step {record.step}/{self._steps}  held-out loss {record.eval_loss:.4f}")
        self._write(asdict(record))

    def _write(self, values: dict[str, Any]) -> None:
        if self._log is None:
            return
        self._log.write(json.dumps(values) + "\n")
        self._log.flush()
        if self._board is not None:
            for name, value in values.items():
                if name != "step" and value is not None and math.isfinite(value):
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Ends the logs and draws the loss curve, where matplotlib is installed."""
        if self._log is None:
            return
        self._bar.close()
        self._log.close()
        if self._board is not None:
            self._board.close()
        try:
            plot_loss(read_log(self._directory), self._directory / "loss.png")
        except ImportError:
            self.say("matplotlib is not installed: the loss curve is not drawn")


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The records of a run's log; a line that was being written when the run died is left out."""
    path = directory / LOG
    if not path.exists():
        return []
    found = []
    for line in lines(read_text(path, _LOG_BYTES)):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Draws training and held-out loss over steps, the latter from before the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [r for r in records if "loss" in r]
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training")
    held = [r for r in records if r.get("eval_loss") is not None]
    if held:
        axes.plot([r["step"] for r in held], [r["eval_loss"] for r in held], "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def peak_memory_bytes(mesh: Mesh) -> int:
    """The most that this rank's device (on CUDA) or process (on a CPU) held."""
    if mesh.device.type == "cuda":
        return torch.cuda.max_memory_allocated(mesh.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(mesh: Mesh, precision: str) -> float | None:
    """Of this rank's device, by its name; None for one that the planner does not know."""
    if mesh.device.type != "cuda":
        return None
    from colrow.planner.hardware import ALIASES, find_hardware

    name = torch.cuda.get_device_name(mesh.device).lower()
    known = next((alias for alias in ALIASES if alias in name), None)
    return None if known is None else dict(find_hardware(known).device.peak_flops).get(precision)
