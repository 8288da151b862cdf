"""Contestants of the decoding workloads: each generates greedily from the same prompt."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.weights import prompt
from benchmarks.peers.workloads import Decoding
from colrow.verification.reference import cached_step, quiet_transformers


class Decoder(ABC):
    """A model and its prompt."""

    def __init__(self, workload: Decoding, directory: Path) -> None:
        self.workload = workload
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.ids = prompt(directory, workload.prompt)
        self.build(directory)

    @abstractmethod
    def build(self, directory: Path) -> None:
        """Loads the model."""

    @abstractmethod
    def loss(self) -> float:
        """The mean next-token loss of the prompt."""

    @abstractmethod
    def generate(self) -> tuple[list[int], list[float]]:
        """The tokens, and the time at which the host knew each, from the start."""

    def check(self) -> dict[str, list[float]]:
        """The loss and the greedy tokens, which all contestants must share."""
        return {"losses": [self.loss()], "tokens": [float(t) for t in self.generate()[0]]}

    def measure(self) -> dict[str, list[float]]:
        """Seconds to the first token, and of each token after it."""
        first, later = [], []
        for _ in range(self.workload.repeats):
            if dist.is_initialized():
                dist.barrier()
            _, times = self.generate()
            first.append(times[0])
            later += [b - a for a, b in pairwise(times)]
        return {"first_token_seconds": first, "token_seconds": later}


class Colrow(Decoder):
    """colrow's generate."""

    def build(self, directory: Path) -> None:
        import colrow

        size = dist.get_world_size() if dist.is_initialized() else 1
        mesh = colrow.init_mesh(tp=size, device="cpu")
        self.model = colrow.from_pretrained(directory, mesh, dtype=self.dtype).for_decoding()

    @torch.inference_mode()
    def loss(self) -> float:
        return self.model.loss(self.ids, self.ids).item()

    def generate(self) -> tuple[list[int], list[float]]:
        from colrow.generation.generate import generate

        times: list[float] = []
        started = time.perf_counter()
        result = generate(
            self.model,
            self.ids,
            max_new_tokens=self.workload.tokens,
            on_tokens=lambda _: times.append(time.perf_counter() - started),
        )
        return result.token_ids[0], times


class Transformers(Decoder):
    """transformers' model, unsplit, with its cache.

    A bare loop rather than ``generate``, whose bookkeeping costs it more.
    """

    def build(self, directory: Path) -> None:
        with quiet_transformers():
            from transformers import AutoModelForCausalLM

            self.model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=self.dtype, **self.split()
            ).eval()

    def split(self) -> dict[str, object]:
        """Arguments of ``from_pretrained`` that make it parallel."""
        return {}

    @torch.inference_mode()
    def loss(self) -> float:
        return float(_whole(self.model(self.ids, labels=self.ids).loss))

    @torch.inference_mode()
    def generate(self) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        times: list[float] = []
        ids, cache = self.ids, None
        started = time.perf_counter()
        for _ in range(self.workload.tokens):
            logits, cache = cached_step(self.model, ids, cache, logits_to_keep=1)
            tokens.append(int(_whole(logits)[0, -1].argmax()))
            times.append(time.perf_counter() - started)
            ids = torch.tensor([[tokens[-1]]])
        return tokens, times


class TransformersSplit(Transformers):
    """transformers' own tensor parallelism, by the plan of its Llama."""

    def split(self) -> dict[str, object]:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())}


class DeepSpeed(Transformers):
    """DeepSpeed's AutoTP on transformers' model."""

    def build(self, directory: Path) -> None:
        super().build(directory)
        import deepspeed

        size = dist.get_world_size()
        engine = deepspeed.init_inference(
            self.model,
            dtype=self.dtype,
            tensor_parallel={"tp_size": size},
            replace_with_kernel_inject=False,
        )
        self.model = engine.module


def _whole(x: Tensor) -> Tensor:
    """A DTensor's value."""
    full = getattr(x, "full_tensor", None)
    return x if full is None else full()
