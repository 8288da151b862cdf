"""``colrow generate`` on one rank: loads the model, generates, and streams the text on rank 0."""

from __future__ import annotations

import os
import pickle
import sys
import time
from dataclasses import asdict, dataclass

import torch

from colrow.checkpoint.pretrained import from_pretrained
from colrow.generate.engine import generate
from colrow.generate.options import Sampling
from colrow.generate.tokenizer import TextStream, Tokenizer
from colrow.mesh import init_mesh


@dataclass(frozen=True)
class Request:
    """What every rank is asked to do.

    Attributes:
        model: path or hub id.
        prompt_ids: the prompt's tokens.
        tokenizer: pickled, for rank 0 alone: loading it a second time takes longer.
        max_new_tokens, sampling, eos_token_ids: see :func:`colrow.generate.engine.generate`.
        tp: number of ranks.
        dtype: None for bf16 on CUDA and fp32 elsewhere.
        device: None for the mesh's choice.
        engine: see :func:`colrow.init_mesh`.
        stream: whether rank 0 writes the text to standard output as it comes.
    """

    model: str
    prompt_ids: tuple[int, ...]
    tokenizer: bytes
    max_new_tokens: int
    sampling: Sampling
    eos_token_ids: tuple[int, ...]
    tp: int
    dtype: torch.dtype | None
    device: str | None
    engine: str
    stream: bool


def answer(request: Request) -> dict[str, object]:
    """The result as it goes into JSON; ``text`` is empty on other ranks than 0."""
    started = time.perf_counter()
    mesh = init_mesh(tp=request.tp, device=request.device, engine=request.engine)
    dtype = request.dtype or (torch.bfloat16 if mesh.device.type == "cuda" else torch.float32)
    model = from_pretrained(request.model, mesh, dtype=dtype).for_decoding()
    load_seconds = time.perf_counter() - started
    writer = _Writer(request) if mesh.tp.rank == 0 else None
    result = generate(
        model,
        torch.tensor([request.prompt_ids], device=mesh.device),
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        eos_token_ids=request.eos_token_ids,
        on_tokens=writer.push if writer else None,
    )
    kv_heads = model.layout.heads.key_value.sizes
    return {
        "model": request.model,
        "tp": request.tp,
        "dtype": str(dtype).removeprefix("torch."),
        "device": mesh.device.type,
        "engine": mesh.engine.name,
        "sampling": asdict(request.sampling),
        "prompt_tokens": len(request.prompt_ids),
        "text": writer.finish() if writer else "",
        "token_ids": result.token_ids[0],
        "finish_reason": "stop" if result.finished[0] else "length",
        "tokens_per_second": result.tokens_per_second,
        "time_to_first_token_seconds": result.time_to_first_token_seconds,
        "load_seconds": load_seconds,
        "weight_bytes_per_rank": model.weight_bytes_per_rank(),
        "cache_bytes_per_rank": [
            result.cache_bytes * held // kv_heads[mesh.tp.rank] for held in kv_heads
        ],
    }


class _Writer:
    """Collects the text, and writes it while it comes when that is asked for."""

    def __init__(self, request: Request) -> None:
        tokenizer: Tokenizer = pickle.loads(request.tokenizer)
        self._pieces = TextStream(tokenizer)
        self._stream = request.stream
        self._text = ""

    def push(self, tokens: list[int]) -> None:
        """Takes the next token of the one row."""
        self._write(self._pieces.push(tokens[0]))

    def finish(self) -> str:
        """Ends the line; returns the whole text."""
        self._write(self._pieces.finish())
        text = self._text
        if not text.endswith("\n"):
            self._write("\n")
        return text

    def _write(self, piece: str) -> None:
        self._text += piece
        if not self._stream or not piece:
            return
        try:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()
        except BrokenPipeError:
            # Nothing more can be written, and nothing is left for the process's end to flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
