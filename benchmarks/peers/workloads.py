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
    )
}


def as_dict(workload: Workload) -> dict[str, object]:
    """For JSON."""
    return {"kind": type(workload).__name__, **asdict(workload)}
