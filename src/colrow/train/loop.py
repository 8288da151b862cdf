"""The training run: ``colrow train`` on one rank."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from colrow.checkpoint.run_directory import CHECKPOINTS, MODEL_FILES, SETTINGS
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.ledger import record
from colrow.comm.mesh import Mesh, init_mesh
from colrow.models.decoder import Decoder
from colrow.models.interface import TensorParallelModel
from colrow.models.stages import LayerSplit
from colrow.optim.scaler import GradScaler
from colrow.pipeline.limits import schedule_named
from colrow.pipeline.rank_map import rank_map
from colrow.pipeline.runner import PipelineRunner
from colrow.progress import Progress
from colrow.train.batches import Order, Windows
from colrow.train.data import global_rank, training_and_held_out
from colrow.train.faults import StopRequest, check_agreement, output_held, stop_on_signals
from colrow.train.optimizer import learning_rate, make_optimizers
from colrow.train.parallel import parallelize
from colrow.train.report import Reporter, StepRecord, peak_flops, peak_memory_bytes
from colrow.train.settings import TrainSettings, to_toml
from colrow.train.starting_model import COMPUTE_DTYPES, build_model, save_model_files
from colrow.train.step import Stepper, StepResult, evaluate

# Until the first step is done, in which ranks read, copy and compile at their own pace.
_SECONDS_TO_BEGIN = 600.0


@dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended.

    Attributes:
        step: steps taken in all.
        loss: of the last step; None when there was nothing left to do.
        eval_loss: on held-out text at the end; None when it was stopped before.
        initial_eval_loss: before the first step; None when the run continued from a checkpoint.
        stopped_by: the signal that stopped it, or "".
    """

    step: int
    loss: float | None
    eval_loss: float | None
    initial_eval_loss: float | None = None
    stopped_by: str = ""


def train(settings: TrainSettings) -> TrainingOutcome:
    """Trains until ``settings.steps``, from the newest checkpoint where there is one.

    Rank 0 locks the output directory meanwhile.

    Communicates: all ranks of the grid call it with equal settings.

    Raises:
        ValueError: input that cannot be used, before anything is computed.
        RuntimeError: a loss or gradient that is not finite, or a checkpoint that cannot be written.
    """
    with stop_on_signals() as stop, output_held(settings, global_rank() == 0):
        output = Path(settings.output)
        training, held_out = training_and_held_out(settings)
        mesh = init_mesh(
            tp=settings.tp,
            dp=settings.dp,
            pp=settings.pp,
            device=None if settings.device == "auto" else settings.device,
            engine=settings.engine,
            timeout=timedelta(seconds=max(settings.timeout_seconds, _SECONDS_TO_BEGIN)),
        )
        data = {"training data": training.tokens.sha256, "held-out data": held_out.tokens.sha256}
        check_agreement({**asdict(settings), **data}, mesh)
        with Progress(f"loading {settings.model}", active=global_rank() == 0):
            run = _Run(settings, mesh, Order(training, settings.seed), held_out)
            run.checkpoints.lock()
            start = run.resume()
        reporter = Reporter(output, settings.steps, first_step=start, active=global_rank() == 0)
        if global_rank() == 0:
            save_model_files(settings, output / MODEL_FILES, tied=run.tied)
            (output / SETTINGS).write_text(to_toml(settings), encoding="utf-8")
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        reporter.say(run.model.description.says)
        if mesh.world_size > 1:
            reporter.say(rank_map(mesh.tp.size, mesh.dp.size, run.split))
        if start or restarts:
            again = f" (restart {restarts} of {settings.max_restarts})" if restarts else ""
            reporter.say(f"continuing after step {start}{again}")
        try:
            return run.until_done(start, reporter, stop)
        finally:
            reporter.close()


def make_loss(
    settings: TrainSettings, model: TensorParallelModel, mesh: Mesh
) -> nn.Module | PipelineRunner:
    """What takes microbatches to gradients: the model, wrapped, or its pipeline."""
    options: dict[str, Any] = {
        "fsdp": settings.fsdp,
        "compute_dtype": COMPUTE_DTYPES.get(settings.precision),
        "recompute": settings.recompute,
        "label_smoothing": settings.label_smoothing,
        "z_loss": settings.z_loss,
    }
    if mesh.pp.size == 1:
        return parallelize(model, mesh, **options)
    assert isinstance(model, Decoder)
    return PipelineRunner(
        model,
        mesh,
        schedule_named(settings.schedule),
        microbatches=settings.microbatches,
        microbatch=settings.microbatch,
        sequence=settings.sequence,
        **options,
    )


class _Run:
    """The parts of a run and what happens at each step."""

    def __init__(
        self, settings: TrainSettings, mesh: Mesh, order: Order, held_out: Windows
    ) -> None:
        self.settings, self.mesh, self.order, self.held_out = settings, mesh, order, held_out
        self.model = build_model(settings, mesh)
        self.loss = make_loss(settings, self.model, mesh)
        self.optimizer = make_optimizers(self.model, settings)
        self.stepper = Stepper(
            self.model.module,
            self.loss,
            self.optimizer,
            mesh,
            order,
            microbatch=settings.microbatch,
            global_batch=settings.global_batch,
            clip=settings.clip,
            dropout_seed=settings.seed,
            scaler=GradScaler(mesh) if settings.precision == "fp16" else None,
        )
        self.checkpoints = TrainingCheckpoints(
            Path(settings.output) / CHECKPOINTS, mesh, keep=settings.keep
        )
        self._speed = _Speed(settings, mesh, self.model.num_parameters)

    @property
    def split(self) -> LayerSplit:
        """Which layers are on which rank of the pipeline."""
        return self.model.pipeline.split if isinstance(self.model, Decoder) else LayerSplit((1,), 1)

    @property
    def tied(self) -> bool | None:
        """Whether embedding and head of a model that was split in place are one matrix."""
        config: Any = getattr(self.model.module, "config", None)
        return getattr(config, "tie_word_embeddings", None)

    def identity(self) -> dict[str, Any]:
        """What must not change between the parts of a run, or the data would not continue."""
        names = ("sequence", "global_batch", "seed", "precision", "eval_share", "optimizer")
        values = {name: getattr(self.settings, name) for name in names}
        return {**values, "data": self.order.windows.tokens.sha256}

    def resume(self) -> int:
        """Loads the newest checkpoint; the number of steps that were taken."""
        latest = self.checkpoints.latest()
        if latest is None:
            return 0
        saved = self.checkpoints.state(latest)
        before = {"optimizer": "adamw", **saved["identity"]}
        for name, value in self.identity().items():
            if before.get(name) != value:
                raise ValueError(
                    f"the checkpoint {self.checkpoints.path(latest)} was made with "
                    f"{name}={before.get(name)!r}, not {value!r}: continue with that, "
                    "or train in another --output"
                )
        self.checkpoints.load(latest, self.model.module, self.optimizer)
        if self.stepper.scaler is not None:
            self.stepper.scaler.load_state_dict(saved["scaler"])
        return latest

    def until_done(self, start: int, reporter: Reporter, stop: StopRequest) -> TrainingOutcome:
        settings, done, result = self.settings, start, None
        eval_loss, initial = None, None
        if done == 0:
            initial = self._evaluate()
            reporter.begin(initial)
        while done < settings.steps:
            logged = (done + 1) % settings.log_every == 0 or done + 1 == settings.steps
            rate = self._rate(done)
            result = self._timed_step(done, rate, logged, stop)
            done += 1
            memory = peak_memory_bytes(self.mesh)
            reporter.advance(done, result, rate, self._speed.newest_seconds, memory)
            if done == start + 1:
                self.mesh.limit_waits(timedelta(seconds=settings.timeout_seconds))
            last = done == settings.steps
            if done % settings.save_every == 0 or last or result.stop:
                self._save(done)
            else:
                self.checkpoints.check()
            eval_loss = None
            if last or (settings.eval_every and done % settings.eval_every == 0):
                eval_loss = self._evaluate()
            if logged or eval_loss is not None:
                reporter.add(self._speed.record(done, result, rate, eval_loss))
            if result.stop and not last:
                self.checkpoints.wait()
                reporter.say(
                    f"stopped by {stop.name or 'a signal'}, and continued by the same command; "
                    f"saved after step {done}"
                )
                return TrainingOutcome(
                    done, result.loss, eval_loss, initial, stop.name or "a signal"
                )
        self.checkpoints.wait()
        if result is None:
            eval_loss = self._evaluate()
            reporter.say(f"all {settings.steps} steps were taken before")
        return TrainingOutcome(done, None if result is None else result.loss, eval_loss, initial)

    def _rate(self, step: int) -> float:
        settings = self.settings
        return learning_rate(
            step,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.steps,
            final_share=settings.final_learning_rate_share,
        )

    def _timed_step(self, step: int, rate: float, logged: bool, stop: StopRequest) -> StepResult:
        started = time.perf_counter()
        if not logged:
            result = self.stepper.step(step, rate, stop=bool(stop))
            self._speed.add(result, time.perf_counter() - started)
            return result
        with record(*self.mesh.groups) as ledger:  # on CUDA recording waits for each collective
            result = self.stepper.step(step, rate, stop=bool(stop))
        self._speed.add(result, time.perf_counter() - started, ledger.seconds(exposed=True))
        return result

    def _save(self, step: int) -> None:
        state: dict[str, Any] = {"identity": self.identity()}
        if self.stepper.scaler is not None:
            state["scaler"] = self.stepper.scaler.state_dict()
        self.checkpoints.save(step, self.model.module, self.optimizer, state)

    def _evaluate(self) -> float:
        return evaluate(
            self.loss,
            self.mesh,
            self.held_out,
            microbatch=self.settings.microbatch,
            sequences=self.settings.eval_sequences,
        )


class _Speed:
    """Times and counts since the last line of the log."""

    def __init__(self, settings: TrainSettings, mesh: Mesh, parameters: int) -> None:
        self._mesh, self._parameters = mesh, parameters
        self._peak = peak_flops(mesh, settings.precision)
        self._seconds: list[float] = []
        self._tokens = 0
        self._share = self.newest_seconds = 0.0

    def add(self, result: StepResult, seconds: float, waited_seconds: float | None = None) -> None:
        self._seconds.append(seconds)
        self.newest_seconds = seconds
        self._tokens += result.tokens
        if waited_seconds is not None:
            self._share = waited_seconds / seconds

    def record(
        self, step: int, result: StepResult, rate: float, eval_loss: float | None
    ) -> StepRecord:
        seconds, tokens = sum(self._seconds), self._tokens
        per_second = tokens / seconds if seconds else 0.0
        mfu = None
        if self._peak is not None:  # 6 FLOPs per parameter and token (Kaplan et al. 2020)
            mfu = 6 * self._parameters * per_second / (self._peak * self._mesh.world_size)
        found = StepRecord(
            step=step,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=None if result.skipped else result.grad_norm,
            tokens_per_second=per_second,
            step_seconds=seconds / max(1, len(self._seconds)),
            communication_share=self._share,
            mfu=mfu,
            memory_bytes=peak_memory_bytes(self._mesh),
            eval_loss=eval_loss,
        )
        self._seconds, self._tokens = [], 0
        return found
