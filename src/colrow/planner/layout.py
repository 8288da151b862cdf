"""A training layout: how the work is divided, in what order it runs, in which number formats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from colrow.layers.describe import Attention, BlockSpec, Division
from colrow.planner.model import ModelShape
from colrow.planner.serving import WEIGHT_BYTES
from colrow.planner.software import Software, find_software
from colrow.planner.stage_layers import kinds_of_stages, layers_of_stages

Recompute = Literal["none", "selective", "full"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2"]
Optimizer = Literal["adamw", "adamw-8bit", "sgd", "sgd-momentum", "none"]

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2")
OPTIMIZERS = ("adamw", "adamw-8bit", "sgd", "sgd-momentum", "none")
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
STATES = {"adamw": 2, "adamw-8bit": 2, "sgd": 0, "sgd-momentum": 1, "none": 0}


@dataclass(frozen=True)
class Layout:
    """How one training step is laid out over ``tp * cp * dp * pp`` devices.

    Attributes:
        tp, pp, dp: tensor-, pipeline- and data-parallel sizes.
        cp: context-parallel size: ranks that each have a part of every sequence, and pass keys and
            values round (Liu et al. 2023, ring attention; causal parts balanced).
        ep: expert-parallel size: over how many of the dp x cp ranks a layer's experts are divided,
            to which tokens travel and from which they return (Lepikhin et al. 2020, GShard).
        microbatch: sequences in one forward pass of one replica.
        global_batch: sequences in one optimiser step of all replicas; by default one microbatch per
            pipeline stage and replica.
        sequence: tokens of a sequence.
        sequence_parallel: norms, dropout and residuals divided over the sequence.
        recompute: what backward computes again: nothing, the attention's scores ("selective",
            Korthikanti et al. 2022, section 5), or whole blocks from their inputs ("full", Chen et
            al. 2016).
        schedule: of the pipeline.
        virtual_stages: chunks of layers per device of the interleaved schedule.
        zero: what data parallelism divides: 1 the optimiser's state, 2 gradients too, 3 parameters
            too, as FSDP does (Rajbhandari et al. 2020, section 5).
        precision: of the matmuls: "fp32", "bf16", "fp16" or "fp8" (weights stored in 16 bit).
        optimizer: "adamw" (two states), "adamw-8bit", "sgd-momentum", "sgd" or "none".
        master_weights: 16-bit training with fp32 gradients and an fp32 copy of the weights, which
            is the default there; off, gradients and states have the weights' format.
        lora_rank: rank of adapters on every linear layer of the blocks (Hu et al. 2021, arXiv
            2106.09685); what they adapt is frozen and has neither gradients nor states. 0: all
            parameters are trained.
        frozen: format of the frozen weights, a key of :data:`colrow.planner.serving.WEIGHT_BYTES`;
            "nf4" is QLoRA (Dettmers et al. 2023). Empty: that of training.
        software: name of a preset of :mod:`colrow.planner.software`.
        attention: "flash", "unfused", or "auto": unfused for selective recomputation (which exists
            for attention that stores its scores), else as device and software have it.
        offload_layers: of how many of a stage's layers what is kept for backward waits in the
            host's memory, sent there during forward and back during backward.
        stage_layers: layers of each pipeline stage, when they are not as even as possible.
        tp_weights: shares of the tensor-parallel ranks, when they are not as even as possible.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    microbatch: int = 1
    global_batch: int | None = None
    sequence: int = 2048
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    zero: int = 0
    precision: str = "bf16"
    optimizer: Optimizer = "adamw"
    master_weights: bool | None = None
    lora_rank: int = 0
    frozen: str = ""
    software: str = "colrow"
    attention: Literal["auto", "flash", "unfused"] = "auto"
    offload_layers: int = 0
    stage_layers: tuple[int, ...] = ()
    tp_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "cp", "ep", "microbatch", "sequence", "virtual_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.global_batch is not None and self.global_batch < 1:
            raise ValueError(f"global_batch={self.global_batch}: must be at least 1")
        choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("recompute", self.recompute, RECOMPUTE),
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, tuple(DTYPE)),
            ("attention", self.attention, ("auto", "flash", "unfused")),
            ("zero", self.zero, (0, 1, 2, 3)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                options = ", ".join(str(option) for option in allowed)
                raise ValueError(f"{name}={value!r}: must be one of {options}")
        if self.offload_layers < 0:
            raise ValueError(f"offload_layers={self.offload_layers}: must not be negative")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank}: must not be negative")
        if self.frozen and not self.lora_rank:
            raise ValueError(f"frozen={self.frozen!r} needs a lora_rank: else nothing is frozen")
        if self.frozen and self.frozen not in WEIGHT_BYTES:
            raise ValueError(f"frozen={self.frozen!r}: must be one of {', '.join(WEIGHT_BYTES)}")
        if self.batch % (self.dp * self.microbatch):
            raise ValueError(
                f"global_batch={self.batch} is not a multiple of dp x microbatch = {self.dp} x "
                f"{self.microbatch}"
            )
        if self.virtual_stages > 1 and self.schedule != "interleaved":
            raise ValueError(
                f"virtual_stages={self.virtual_stages} needs schedule='interleaved', not "
                f"{self.schedule!r}"
            )
        if self.schedule == "interleaved" and self.virtual_stages == 1 and self.pp > 1:
            raise ValueError(
                "schedule='interleaved' needs virtual_stages of at least 2: with one chunk of "
                "layers per device it is 1f1b"
            )
        if self.virtual_stages > 1 and self.pp == 1:
            raise ValueError("virtual_stages needs a pipeline: pp of at least 2")
        if self.sequence < self.cp:
            raise ValueError(f"a sequence of {self.sequence} cannot be divided over cp={self.cp}")
        if self.sequence_parallel and self.local_sequence < self.tp:
            raise ValueError(f"a sequence of {self.sequence} cannot be divided over tp={self.tp}")
        if self.stage_layers and len(self.stage_layers) != self.pp:
            raise ValueError(f"{len(self.stage_layers)} stage_layers for pp={self.pp}")
        if self.tp_weights and len(self.tp_weights) != self.tp:
            raise ValueError(f"{len(self.tp_weights)} tp_weights for tp={self.tp}")
        find_software(self.software)

    @property
    def devices(self) -> int:
        """tp * cp * dp * pp."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def local_sequence(self) -> int:
        """Tokens of a sequence on a context-parallel rank."""
        return -(-self.sequence // self.cp)

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch on a context-parallel rank."""
        return self.microbatch * self.local_sequence

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters: those of dp and of cp."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.replicas // self.ep

    @property
    def batch(self) -> int:
        """Sequences per step of all replicas."""
        return self.global_batch or self.dp * self.microbatch * self.pp

    @property
    def num_microbatches(self) -> int:
        """Forward passes per replica and step."""
        return self.batch // (self.dp * self.microbatch)

    @property
    def per_microbatch(self) -> Layout:
        """The layout as far as one microbatch depends on it, a key under which results are kept.

        Whether there is one microbatch or more decides whether gradients are accumulated.
        """
        return replace(
            self,
            pp=1,
            dp=1,
            global_batch=self.microbatch * min(self.num_microbatches, 2),
            schedule="1f1b",
            virtual_stages=1,
            zero=0,
            offload_layers=0,
            stage_layers=(),
        )

    @property
    def division(self) -> Division:
        """How tensor parallelism divides dimensions."""
        return Division(self.tp, self.tp_weights)

    @property
    def program(self) -> Software:
        """The software preset."""
        return find_software(self.software)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight and of an activation."""
        return ITEMSIZE[self.precision]

    @property
    def frozen_bytes(self) -> float:
        """Bytes of a frozen weight."""
        return WEIGHT_BYTES[self.frozen] if self.frozen else float(self.itemsize)

    @property
    def has_master_weights(self) -> bool:
        """Whether the optimiser keeps an fp32 copy of 16-bit weights."""
        if self.optimizer == "none" or self.itemsize >= 4:
            return False
        return True if self.master_weights is None else self.master_weights

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an accumulated gradient."""
        return self.program.gradient_bytes if self.has_master_weights else self.itemsize

    @property
    def state_bytes(self) -> float:
        """Bytes of the optimiser's state per parameter, an fp32 copy of the weights included."""
        if self.optimizer == "adamw-8bit":
            # 8 bits per state and an fp32 scale per block of 256 (Dettmers et al. 2021, section 2).
            each = 1 + 4 / 256
        else:
            each = 4 if self.has_master_weights else self.itemsize
        return STATES[self.optimizer] * each + (4 if self.has_master_weights else 0)

    def is_flash(self, attention: Attention, device_has_flash: bool) -> bool:
        """Whether attention runs as one fused kernel."""
        program = self.program
        if self.attention != "auto":
            return self.attention == "flash"
        if self.recompute == "selective" or not device_has_flash:
            return False
        drops = attention.dropout > 0 and not program.flash_dropout
        return program.flash_attention and attention.plain_scores and not drops

    def layers_of_stage(self, model: ModelShape) -> tuple[int, ...]:
        """Transformer layers of each pipeline device; see :func:`layers_of_stages`."""
        rule = self.program.stage_rule
        return layers_of_stages(model, self.pp, self.virtual_stages, self.stage_layers, rule)

    def kinds_of_stages(self, model: ModelShape) -> tuple[dict[BlockSpec, int], ...]:
        """Of each pipeline device the kinds of its blocks, and how many of each."""
        return kinds_of_stages(model, self.layers_of_stage(model), self.virtual_stages)

    def describe(self) -> str:
        """One line, such as "TP 8 x PP 2 x DP 4 + SP, microbatch 2"."""
        text = f"TP {self.tp} × PP {self.pp} × DP {self.dp}"
        if self.cp > 1:
            text += f" × CP {self.cp}"
        if self.ep > 1:
            text += f" + EP {self.ep}"
        if self.sequence_parallel:
            text += " + SP"
        if self.zero:
            text += f" + ZeRO-{self.zero}"
        text += f", microbatch {self.microbatch}"
        if self.pp > 1:
            chunks = f" ({self.virtual_stages} chunks)" if self.virtual_stages > 1 else ""
            text += f", {self.schedule}{chunks}"
        if self.lora_rank:
            text += f", LoRA {self.lora_rank}" + (f" on {self.frozen}" if self.frozen else "")
        if self.offload_layers:
            text += f", {self.offload_layers} layers offloaded"
        if self.recompute != "none":
            text += f", {self.recompute} recomputation"
        return text
