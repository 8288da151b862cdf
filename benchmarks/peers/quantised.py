"""Contestants that generate from a quantised GGUF file: llama.cpp and colrow, the same tokens."""

from __future__ import annotations

import ctypes
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import decoding
from benchmarks.peers.weights import TEXT
from benchmarks.peers.workloads import Decoding

_COMPARED = 8  # tokens of the prompt whose likelihood is compared
_BATCH = 512  # tokens that llama.cpp takes at once


class _Quantised(decoding.Decoder):
    """A file and its prompt."""

    def __init__(self, workload: Decoding, file: Path) -> None:
        from colrow.generation.tokenizer import load_tokenizer

        self.workload = workload
        text = load_tokenizer(file)(TEXT.read_text(encoding="utf-8")).input_ids
        self.ids = torch.tensor([text[: workload.prompt]])
        self.build(file)

    @abstractmethod
    def start(self) -> None:
        """Forgets all tokens."""

    @abstractmethod
    def feed(self, ids: list[int]) -> Tensor:
        """The logits behind the last of some more tokens."""

    def loss(self) -> float:
        """The mean next-token loss of the prompt's last tokens, taken one by one."""
        ids: list[int] = self.ids[0].tolist()
        self.start()
        logits, losses = self.feed(ids[:-_COMPARED]), []
        for token in ids[-_COMPARED:]:
            losses.append(-logits.double().log_softmax(0)[token].item())
            logits = self.feed([token])
        return sum(losses) / len(losses)


class Colrow(_Quantised):
    """colrow's generate, the weights in the file's blocks."""

    def build(self, directory: Path) -> None:
        import colrow

        size = dist.get_world_size() if dist.is_initialized() else 1
        self.mesh = colrow.init_mesh(tp=size, device="cpu")
        model = colrow.from_pretrained(directory, self.mesh, quantised=True)
        self.model = model.for_decoding()

    def start(self) -> None:
        self.cache = self.model.make_cache(1, self.workload.prompt)

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> Tensor:
        import colrow

        given = torch.tensor([ids])
        local = self.model.last_logits(given, attention_mask=None, cache=self.cache)
        whole = colrow.gather_from_tp(local, self.mesh.tp, partition=self.model.vocab)
        return whole[0]

    generate = decoding.Colrow.generate  # type: ignore[assignment]


class LlamaCpp(_Quantised):
    """llama.cpp by its C interface, one call a token, with as many threads as the process has."""

    def build(self, directory: Path) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.api.llama_log_set(_say_nothing, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        settings = self.api.llama_model_default_params()
        self.weights = self.api.llama_load_model_from_file(str(directory).encode(), settings)
        self.size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.weights))
        options = self.api.llama_context_default_params()
        options.n_ctx = self.workload.prompt + self.workload.tokens + _COMPARED
        options.n_batch = options.n_ubatch = _BATCH
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = self.api.llama_new_context_with_model(self.weights, options)

    def start(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def feed(self, ids: list[int]) -> Tensor:
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            given = (self.api.llama_token * len(part))(*part)
            if self.api.llama_decode(self.context, self.api.llama_batch_get_one(given, len(part))):
                raise RuntimeError("llama.cpp could not take these tokens")
        found = self.api.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, (self.size,)))

    def feed_all(self, ids: list[int]) -> Tensor:
        """The logits behind each token, ``[tokens, vocabulary]``; at most a batch."""
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not take these tokens")
        self.api.llama_batch_free(batch)
        found = self.api.llama_get_logits(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(found, (len(ids), self.size))).clone()

    def generate(self) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        times: list[float] = []
        self.start()
        ids: list[int] = self.ids[0].tolist()
        started = time.perf_counter()
        for _ in range(self.workload.tokens):
            tokens.append(int(self.feed(ids).argmax()))
            times.append(time.perf_counter() - started)
            ids = tokens[-1:]
        return tokens, times


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _say_nothing(_level: int, _text: bytes, _data: int) -> None:
    pass
