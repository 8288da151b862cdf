"""How a model generates, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

# Bytes of a weight. int8 and int4 have a 16-bit scale for every 128 weights (Frantar et al. 2022,
# arXiv 2210.17323, section 4); MXFP4 and MXFP8 a byte for every 32 (OCP Microscaling 1.0, section
# 5.2); NF4 a number for every 64, itself in 8 bits (Dettmers et al. 2023, arXiv 2305.14314, section
# 3); GGUF's Q4_K, Q6_K and Q8_0 144 and 210 bytes for 256 weights, 34 for 32.
WEIGHT_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1 + 2 / 128,
    "int4": 0.5 + 2 / 128,
    "mxfp8": 1 + 1 / 32,
    "mxfp4": 0.5 + 1 / 32,
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
    "q4_k": 144 / 256,
    "q6_k": 210 / 256,
    "q8_0": 34 / 32,
}
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


@dataclass(frozen=True)
class Serving:
    """How a model generates.

    Attributes:
        tp, pp: tensor- and pipeline-parallel sizes of one replica.
        dp: replicas, each with its own ``batch``.
        batch: sequences of a replica that are generated together.
        prompt: tokens read first.
        new_tokens: tokens generated for each sequence.
        weights: format of the weights of the blocks: a key of
            ``WEIGHT_BYTES``; embedding and head stay in 16 bit when the blocks are narrower.
        kv_cache: format of keys and values.
        tp_weights, stage_layers: uneven shares, as in :class:`colrow.planner.layout.Layout`.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    batch: int = 1
    prompt: int = 2048
    new_tokens: int = 256
    weights: str = "bf16"
    kv_cache: str = "bf16"
    tp_weights: tuple[float, ...] = ()
    stage_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "batch", "prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.new_tokens < 0:
            raise ValueError(f"new_tokens={self.new_tokens}: must not be negative")
        if self.weights not in WEIGHT_BYTES:
            raise ValueError(f"weights={self.weights!r}: must be one of {', '.join(WEIGHT_BYTES)}")
        if self.kv_cache not in KV_BYTES:
            raise ValueError(f"kv_cache={self.kv_cache!r}: must be one of {', '.join(KV_BYTES)}")

    @property
    def devices(self) -> int:
        """tp * pp * dp."""
        return self.tp * self.pp * self.dp

    @property
    def compute_precision(self) -> str:
        """What the matmuls run in: quantised weights are widened first."""
        return self.weights if self.weights in ("fp32", "bf16", "fp8") else "fp16"

    def describe(self) -> str:
        """One line."""
        text = f"TP {self.tp} × PP {self.pp}" + (f" × DP {self.dp}" if self.dp > 1 else "")
        return f"{text}, {self.weights} weights, batch {self.batch}"


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on the fullest rank; the parts add up."""

    weights: float
    kv_cache: float
    activations: float
    reserve: float

    @property
    def total(self) -> float:
        """Everything."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class TokenTime:
    """Seconds to generate one token for each sequence of a replica; the parts add up.

    Attributes:
        weights: reading (or, for large batches, multiplying with) the weights.
        attention: reading keys and values.
        tp: tensor-parallel all-reduces.
        pp: handing on between stages.
        launches: starting kernels that have next to nothing to do.
    """

    weights: float
    attention: float
    tp: float
    pp: float
    launches: float

    @property
    def total(self) -> float:
        """The token."""
        return float(sum(getattr(self, field.name) for field in fields(self)))
