"""Everything that a training run depends on, from a TOML file and the command line. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from colrow.files import SETTINGS_BYTES, parse_toml, read_text, shown
from colrow.pipeline.schedules import SCHEDULES

PRECISIONS = ("fp32", "bf16", "fp16", "fp64")
# Optimisers and their peak learning rates.
OPTIMIZERS = {"adamw": 3e-4, "sgd": 0.1, "muon": 3e-4, "adafactor": 1e-3}
RECOMPUTE = ("none", "selective", "full")
_MOST = {"tp": 1 << 16, "dp": 1 << 16, "pp": 1 << 16, "sequence": 1 << 28, "global_batch": 1 << 30}


# The sizes of the grid of ranks, and what else says how it divides a model.
SIZES = frozenset({"tp", "dp", "pp"})
LAYOUT = (
    "tp",
    "dp",
    "pp",
    "tensor_split",
    "layer_split",
    "sequence_parallel",
    "schedule",
    "stages_per_rank",
)


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainSettings:
    """The settings of ``colrow train``; each is a key of the TOML file and an option.

    Raises:
        ValueError: values that do not go together, named.
    """

    model: str = _option(
        "",
        "Hugging Face directory, cached hub id or .gguf file to fine-tune, or "
        "a config.json to train from random weights; of any architecture of transformers",
    )
    data: str = _option(
        "", "text, JSON Lines or Parquet file, a directory of them, or a saved Hugging Face dataset"
    )
    output: str = _option(
        "",
        "directory for checkpoints, logs and the resolved settings; a run that "
        "finds checkpoints there continues from the newest",
    )
    tokenizer: str = _option(
        "", 'checkpoint whose tokenizer to use, or "bytes"; by default the model\'s own'
    )
    token_cache: str = _option("", "directory for tokenised texts (default OUTPUT/tokens)")
    eval_data: str = _option("", "text to evaluate on; by default a share of the data is held out")
    eval_share: float = _option(0.1, "share of the data's sequences that is held out")
    eval_every: int = _option(100, "steps between evaluations; 0 evaluates at the end only")
    eval_sequences: int = _option(64, "sequences per evaluation, at most")
    tp: int = _option(1, "tensor-parallel size")
    dp: int = _option(1, "data-parallel size")
    tensor_split: str = _option(
        "", "the tp ranks' shares of every tensor, such as 2,1 or 0.5,0.3,0.2; by default equal"
    )
    pp: int = _option(1, "pipeline-parallel size: layers are divided over so many ranks")
    schedule: str = _option("1f1b", "of the pipeline's microbatches", SCHEDULES)
    layer_split: str = _option(
        "",
        "layers of each pipeline rank, such as 3,1, or shares, such as 0.5,0.3,0.2; by default so "
        "that all ranks take equally long",
    )
    stages_per_rank: int = _option(
        0, "stages of a pipeline rank (default 2 for interleaved and zbv, else 1)"
    )
    sequence_parallel: bool = _option(
        False, "divide norms, dropout and residuals over the sequence"
    )
    in_place: bool = _option(
        False,
        "take transformers' own model, split in place, also for the families that the decoder "
        "computes itself; other architectures are always trained so (no --pp, --tensor-split and "
        "--recompute selective)",
    )
    fsdp: bool = _option(False, "divide parameters, gradients and optimiser state over dp (FSDP2)")
    device: str = _option("auto", "cpu, cuda or auto")
    engine: str = _option(
        "auto", "what carries bytes between ranks: auto, mpi (CPU ranks of one host), gloo or nccl"
    )
    sequence: int = _option(512, "tokens of a sequence")
    microbatch: int = _option(
        0, "sequences in one forward pass of a dp rank (default 1, or what microbatches says)"
    )
    microbatches: int = _option(
        0, "forward passes of a dp rank in one step (default: what microbatch says)"
    )
    global_batch: int = _option(8, "sequences in one step, over all dp ranks")
    steps: int = _option(100, "optimiser steps of the whole run")
    precision: str = _option(
        "fp32",
        "fp32, bf16 or fp16 (both of what is computed, with fp32 parameters and optimiser; fp16 "
        "scales its loss) or fp64",
        PRECISIONS,
    )
    seed: int = _option(0, "of initial weights, order of the data and dropout")
    optimizer: str = _option(
        "adamw",
        "adamw, sgd (with momentum), muon (the blocks' matrices; AdamW for the rest) or adafactor",
        tuple(OPTIMIZERS),
    )
    learning_rate: float = _option(
        -1.0,
        "peak learning rate (by default "
        + ", ".join(f"{rate:g} for {name}" for name, rate in OPTIMIZERS.items())
        + ")",
    )
    final_learning_rate_share: float = _option(0.1, "share of the peak at the end of the cosine")
    warmup_steps: int = _option(10, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "of matrices")
    momentum: float = _option(0.95, "of muon and sgd")
    beta1: float = _option(0.9, "AdamW's first decay rate")
    beta2: float = _option(0.95, "AdamW's second decay rate")
    epsilon: float = _option(1e-8, "AdamW's epsilon")
    clip: float = _option(1.0, "largest norm of the gradients; 0 does not clip")
    dropout: float = _option(
        -1.0,
        "probability for embeddings, attention and residuals; by default "
        "what the model's configuration says when it starts from random weights, else 0",
    )
    label_smoothing: float = _option(0.0, "weight of the uniform distribution in the target")
    z_loss: float = _option(0.0, "weight of logsumexp squared")
    router_balance: float = _option(
        -1.0,
        "weight of the loss that balances the experts of a mixture; by default what the model's "
        "configuration says",
    )
    router_z: float = _option(0.0, "weight of squared logsumexps of routers' logits")
    recompute: str = _option(
        "none",
        "activations to compute again in backward: none, selective (attention), full (blocks)",
        RECOMPUTE,
    )
    save_every: int = _option(100, "steps between checkpoints; the last step is always saved")
    keep: int = _option(3, "how many of the newest checkpoints stay")
    log_every: int = _option(10, "steps between lines of the log")
    max_restarts: int = _option(0, "how many times all ranks are started again after one died")
    timeout_seconds: float = _option(
        120.0,
        "how long a rank waits for another in a step; up to the end of the first step (meeting, "
        "loading, compiling) ten minutes at least",
    )

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed, on the command line or in the TOML file")
        if Path(self.output).is_file():
            raise ValueError(f"--output {self.output} is a file: name a directory")
        self._check_size()
        self._resolve_microbatches()
        if self.learning_rate == -1.0:
            object.__setattr__(self, "learning_rate", OPTIMIZERS.get(self.optimizer, 0.0))
        at_least = {1: ("tp", "pp", "global_batch", "steps", "keep", "log_every", "save_every",
                        "eval_sequences"),
                    0: ("stages_per_rank", "eval_every", "warmup_steps", "max_restarts", "clip",
                        "weight_decay", "learning_rate", "momentum", "label_smoothing", "z_loss",
                        "router_z"),
                    2: ("sequence",)}  # fmt: skip
        for least, names in at_least.items():
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        for entry in dataclasses.fields(self):
            choices = entry.metadata["choices"]
            if choices and getattr(self, entry.name) not in choices:
                raise ValueError(
                    f"{entry.name}={getattr(self, entry.name)!r}: must be one of "
                    f"{', '.join(choices)}"
                )
        if self.router_balance != -1.0 and self.router_balance < 0:
            raise ValueError(f"router_balance={self.router_balance}: must be at least 0")
        if self.dropout != -1.0 and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.sequence_parallel and self.sequence < self.tp:
            raise ValueError(f"a sequence of {self.sequence} cannot be divided over tp={self.tp}")

    def _check_size(self) -> None:
        """Numbers that no run can have, before anything is computed from them."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{entry.name}={value}: must be a finite number")
            most = _MOST.get(entry.name, 1 << 40)
            if isinstance(value, int) and value > most:
                raise ValueError(f"{entry.name}={shown(value)}: must be at most {most}")

    @property
    def ranks(self) -> int:
        """Of the whole grid."""
        return self.tp * self.dp * self.pp

    def _resolve_microbatches(self) -> None:
        """Of the size of a microbatch and their number each follows from the other."""
        for name in ("dp", "microbatch", "microbatches"):
            least = 1 if name == "dp" else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least or 1}")
        by_size = bool(self.microbatch or not self.microbatches)
        given = (self.microbatch or 1) if by_size else self.microbatches
        rest, left = divmod(self.global_batch, self.dp * given)
        if left or not rest:
            raise ValueError(
                f"global_batch={self.global_batch} is not a multiple of dp x "
                f"{'microbatch' if by_size else 'microbatches'} = {self.dp} x {given}"
            )
        microbatch, count = (given, rest) if by_size else (rest, given)
        if self.microbatches not in (0, count):
            raise ValueError(
                f"microbatches={self.microbatches} of {self.microbatch} sequences on each of "
                f"{self.dp} dp ranks do not make up global_batch={self.global_batch}: leave one of "
                "microbatches and microbatch out"
            )
        object.__setattr__(self, "microbatch", microbatch)
        object.__setattr__(self, "microbatches", count)

    @property
    def from_random(self) -> bool:
        """Whether the model is a configuration without weights."""
        return self.model.endswith(".json")


def load_settings(
    file: str | Path | None,
    overrides: Mapping[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> TrainSettings:
    """The TOML file's settings, with those of the command line in their place.

    Where the command line gives one of the sizes tp, dp and pp, it gives the layout: what the file
    says of the others, and of how they divide, does not count.

    Args:
        file: may be missing.
        overrides: what the command line says.
        say: is told which of the file's settings were left out, and why.

    Raises:
        ValueError: a file that is not TOML, an unknown key, a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = parse_toml(read_text(file, SETTINGS_BYTES))
        except ValueError as error:  # not TOML, or not even text
            raise ValueError(
                f"{file} is not a TOML file of settings ({error}); a model is given as --model"
            ) from error
    types = get_type_hints(TrainSettings)
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{file}: unknown setting {shown(name)}")
        if isinstance(value, int) and not isinstance(value, bool) and types[name] is float:
            values[name] = float(value)
        elif type(value) is not types[name]:
            raise ValueError(
                f"{file}: {name}={shown(value)} should be of type {types[name].__name__}"
            )
    given = sorted(SIZES & overrides.keys())
    if given:
        left_out = {name: values.pop(name) for name in LAYOUT if name in values.keys() - overrides}
        defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainSettings)}
        others = [name for name, value in left_out.items() if value != defaults[name]]
        if others:
            layout = " x ".join(f"{name} {overrides.get(name, 1)}" for name in ("pp", "dp", "tp"))
            said = ", ".join(f"{name} = {shown(left_out[name])}" for name in others)
            options = ", ".join(f"--{name}" for name in given)
            say(
                f"the layout is that of the command line ({options}): {layout}; {file} has {said}, "
                "which belongs to another layout: give it as an option to keep it"
            )
    return TrainSettings(**{**values, **overrides})


def to_toml(settings: TrainSettings) -> str:
    """The settings as a TOML file that :func:`load_settings` reads."""
    lines = ["# The settings of this run, resolved: colrow train THIS_FILE repeats it."]
    for entry in dataclasses.fields(settings):
        if entry.name == "microbatches":  # follows from microbatch, also when dp changes
            continue
        value = getattr(settings, entry.name)
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        else:
            text = repr(value)
        lines.append(f"{entry.name} = {text}")
    return "\n".join(lines) + "\n"
