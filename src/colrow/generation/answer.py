"""``colrow generate`` on one rank: loads the model, generates, and streams the texts on rank 0."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from colrow.any_model.loading import load_model, stays_quantised
from colrow.comm import primitives
from colrow.comm.mesh import init_mesh
from colrow.generation.generate import generate
from colrow.generation.sampling_settings import Sampling
from colrow.generation.tokenizer import TextStream, Tokenizer
from colrow.layers.quantised import QuantisedWeight
from colrow.models.decoder import Decoder
from colrow.models.interface import TensorParallelModel
from colrow.progress import Progress, say


@dataclass(frozen=True)
class Request:
    """What every rank is asked to do.

    Attributes:
        model: path or hub id.
        prompts: the tokens of each prompt.
        listed: whether the result has a list of answers, or is the one answer.
        tokenizer: pickled, for rank 0 alone: loading it a second time takes longer.
        max_new_tokens, sampling, eos_token_ids: see :func:`colrow.generation.generate.generate`.
        tp, pp: number of ranks along each dimension.
        tensor_split, layer_split, in_place, trust_remote_code: see
            :func:`colrow.any_model.loading.load_model`.
        weights: "auto", "quantised", or the name of a dtype in torch.
        device: None for the mesh's choice.
        engine: see :func:`colrow.init_mesh`.
        stream: whether rank 0 writes the text to standard output as it comes.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    listed: bool
    tokenizer: bytes
    max_new_tokens: int
    sampling: Sampling
    eos_token_ids: tuple[int, ...]
    tp: int
    pp: int
    tensor_split: str | None
    layer_split: str | None
    in_place: bool
    trust_remote_code: bool
    weights: str
    device: str | None
    engine: str
    stream: bool


def answer(request: Request) -> dict[str, object]:
    """The result as it goes into JSON; ``text`` is empty on other ranks than 0."""
    started = time.perf_counter()
    mesh = init_mesh(tp=request.tp, pp=request.pp, device=request.device, engine=request.engine)
    first = mesh.world.rank == 0
    quantised, why_not = stays_quantised(
        request.model, request.weights, mesh.device, in_place=request.in_place
    )
    if request.weights in ("auto", "quantised"):
        dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, request.weights)
    if why_not and first:
        say(f"the weights become {name_of(dtype)} numbers: {why_not}")
    with Progress(f"loading {request.model}", active=first):
        model = load_model(
            request.model,
            mesh,
            dtype=dtype,
            quantised=quantised,
            in_place=request.in_place,
            tensor_split=request.tensor_split,
            layer_split=request.layer_split,
            trust_remote_code=request.trust_remote_code,
        ).for_decoding()
    load_seconds = time.perf_counter() - started
    writer = None
    if first:
        tokenizer = pickle.loads(request.tokenizer)
        writer = Writer(
            tokenizer, len(request.prompts), request.eos_token_ids, stream=request.stream
        )
    ids, mask = padded(request.prompts)
    waiting = Progress("reading the prompt", active=first)

    def write(tokens: list[int]) -> None:
        waiting.end()
        if writer:
            writer.push(tokens)

    with waiting:
        result = generate(
            model,
            ids.to(mesh.device),
            attention_mask=mask.to(mesh.device),
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            eos_token_ids=request.eos_token_ids,
            on_tokens=write if first else None,
        )
    texts = writer.finish() if writer else [""] * len(request.prompts)
    answers: list[dict[str, object]] = [
        {
            "prompt_tokens": len(prompt),
            "text": text,
            "token_ids": tokens,
            "finish_reason": "stop" if finished else "length",
        }
        for prompt, text, tokens, finished in zip(
            request.prompts, texts, result.token_ids, result.finished, strict=True
        )
    ]
    cache = torch.tensor([result.cache_bytes], device=mesh.device)
    caches: list[int] = primitives.all_gather(cache, mesh.world, 0, layer="cache").tolist()
    known = model.description
    return {
        "model": request.model,
        "architecture": known.name,
        "kind": known.kind,
        "tp": request.tp,
        "pp": request.pp,
        "tensor_split": request.tensor_split,
        "layers_per_stage": layers_per_stage(model),
        "dtype": name_of(dtype),
        "weights": "quantised" if quantised else name_of(dtype),
        "weight_types": weight_types(model),
        "device": mesh.device.type,
        "engine": mesh.engine.name,
        "sampling": asdict(request.sampling),
        **({"answers": answers} if request.listed else answers[0]),
        "tokens_per_second": result.tokens_per_second,
        "time_to_first_token_seconds": result.time_to_first_token_seconds,
        "load_seconds": load_seconds,
        "weight_bytes_per_rank": model.weight_bytes_per_rank(),
        "cache_bytes_per_rank": caches,
    }


def name_of(dtype: torch.dtype) -> str:
    """Without torch in front."""
    return str(dtype).removeprefix("torch.")


def weight_types(model: TensorParallelModel) -> list[str]:
    """The types of the quantised blocks that this rank holds; none for plain weights."""
    held = [w for w in model.module.parameters() if isinstance(w, QuantisedWeight)]
    return sorted({block.name for weight in held for block in weight.blocks})


def layers_per_stage(model: TensorParallelModel) -> list[int] | None:
    """The sizes of a decoder's pipeline stages; None in place, where there is no pipeline."""
    return list(model.pipeline.split.sizes) if isinstance(model, Decoder) else None


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids ``[prompts, longest]`` with padding on the left, and their mask."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


class Writer:
    """Collects the texts, and writes them while they come, one behind the other.

    Of several answers the first streams; the others wait for it, and then the next one streams.

    Args:
        count: number of answers; of several each has a line with its number above.
        ends: tokens that end an answer; what comes behind is padding.
        stream: whether to write to standard output.
    """

    def __init__(
        self, tokenizer: Tokenizer, count: int, ends: Sequence[int], *, stream: bool
    ) -> None:
        self._pieces = [TextStream(tokenizer) for _ in range(count)]
        self._texts, self._done = [""] * count, [False] * count
        self._ends, self._stream = ends, stream
        self._shown = self._written = 0  # the answer that streams, and how far it is written
        self._headed = False

    def push(self, tokens: list[int]) -> None:
        """Takes the next token of every answer."""
        for row, token in enumerate(tokens):
            if not self._done[row]:
                self._texts[row] += self._pieces[row].push(token)
                if token in self._ends:
                    self._end(row)
        self._write_on()

    def finish(self) -> list[str]:
        """Ends every answer, each with a line's end behind it; returns the texts."""
        for row, done in enumerate(self._done):
            if not done:
                self._end(row)
        self._write_on()
        return self._texts

    def _end(self, row: int) -> None:
        self._done[row] = True
        self._texts[row] += self._pieces[row].finish()

    def _write_on(self) -> None:
        """Writes what has come of the answer that streams, and of those behind it if it is done."""
        count = len(self._texts)
        while self._shown < count:
            text, done = self._texts[self._shown], self._done[self._shown]
            if count > 1 and not self._headed and (text or done):
                self._headed = True
                _write(f"[{self._shown + 1}/{count}]\n", self._stream)
            _write(text[self._written :], self._stream)
            self._written = len(text)
            if not done:
                return
            if not text.endswith("\n"):
                _write("\n", self._stream)
            self._shown, self._written, self._headed = self._shown + 1, 0, False


def _write(piece: str, stream: bool) -> None:
    if not stream or not piece:
        return
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Nothing more can be written, and nothing is left for the process's end to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
