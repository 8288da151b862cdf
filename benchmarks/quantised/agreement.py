"""How far quantised generation is from the exact numbers that a GGUF file stands for.

``python -m benchmarks.quantised.agreement FILE.gguf [--tokens 2000] [--json OUT]`` takes text of
Python's own help, in windows of 500 tokens, and compares the logits of every position with those
of the same weights as fp32 numbers: the mean KL divergence, how often the most likely token is
another one, and the perplexity. Compared are colrow and llama.cpp (from ``make bench-quantised``),
both token by token, as answers are decoded, and all at once, as prompts are read.
"""

from __future__ import annotations

import argparse
import atexit
import json
import multiprocessing
import pydoc_data.topics
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

import colrow
from benchmarks.peers.contestants import LLAMA_CPP
from benchmarks.peers.quantised import LlamaCpp
from benchmarks.peers.workloads import Quantised
from colrow.generation.tokenizer import load_tokenizer

WINDOW = 500
_ROWS = 50  # compared at a time, in fp64

Logits = Callable[[list[int]], Tensor]


def colrow_one_by_one(model: colrow.Decoder) -> Logits:
    def logits(ids: list[int]) -> Tensor:
        cache = model.make_cache(1, len(ids))
        found = [
            model.last_logits(torch.tensor([[token]]), attention_mask=None, cache=cache)
            for token in ids
        ]
        return torch.cat(found)

    return logits


def colrow_at_once(model: colrow.Decoder) -> Logits:
    return lambda ids: model(torch.tensor([ids]))[0]


def serve_llama(pipe: Connection, file: Path) -> None:
    """In a process of its own, since it brings another ggml: token lists to logits."""
    sys.path.append(str(LLAMA_CPP.absolute()))
    torch.set_num_threads(1)
    model = LlamaCpp(Quantised("agreement", "", WINDOW, 0, 0, file=str(file)), file)
    while (asked := pipe.recv()) is not None:
        ids, at_once = asked
        model.start()
        if at_once:
            found = model.feed_all(ids)
        else:
            found = torch.stack([model.feed([token]).clone() for token in ids])
        pipe.send_bytes(found.numpy().tobytes())


def llama(file: Path) -> dict[bool, Logits]:
    """llama.cpp token by token, and all at once."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    context.Process(target=serve_llama, args=(other, file), daemon=True).start()
    atexit.register(pipe.send, None)

    def logits(ids: list[int], at_once: bool) -> Tensor:
        pipe.send((ids, at_once))
        found = torch.frombuffer(bytearray(pipe.recv_bytes()), dtype=torch.float32)
        return found.view(len(ids), -1)

    return {way: partial(logits, at_once=way) for way in (False, True)}


class Sums:
    """Of the positions so far: divergence, other most likely tokens, and the loss of the text."""

    def __init__(self) -> None:
        self.divergence = self.loss = 0.0
        self.others = self.count = self.predicted = 0

    def add(self, found: Tensor, exact: Tensor, ids: list[int]) -> None:
        for start in range(0, len(ids), _ROWS):
            part = slice(start, start + _ROWS)
            p, q = (x[part].double().log_softmax(-1) for x in (exact, found))
            self.divergence += (p.exp() * (p - q)).sum().item()
            self.others += int((p.argmax(-1) != q.argmax(-1)).sum())
            following = torch.tensor(ids[start + 1 : start + 1 + _ROWS])
            self.loss -= q[: len(following)].gather(1, following[:, None]).sum().item()
            self.predicted += len(following)
            self.count += len(p)

    def summary(self) -> dict[str, float]:
        return {
            "kl_divergence": self.divergence / self.count,
            "other_most_likely": self.others / self.count,
            "perplexity": torch.tensor(self.loss / self.predicted).exp().item(),
        }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))[:40000]
    ids = load_tokenizer(args.file)(text).input_ids[: args.tokens]
    exact = colrow.from_pretrained(args.file, dtype=torch.float32).for_decoding()
    model = colrow.from_pretrained(args.file, quantised=True).for_decoding()
    peer = llama(args.file)
    ways = {
        "colrow, token by token": colrow_one_by_one(model),
        "llama.cpp, token by token": peer[False],
        "colrow, at once": colrow_at_once(model),
        "llama.cpp, at once": peer[True],
    }
    sums = {name: Sums() for name in ways}
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        expected = colrow_at_once(exact)(window)
        for name, logits in ways.items():
            sums[name].add(logits(window), expected, window)
    found = {name: each.summary() for name, each in sums.items()}
    print(f"{args.file.name}, {len(ids)} tokens")
    print(f"{'':40} {'KL divergence':>14} {'another token':>14} {'perplexity':>11}")
    for name, values in found.items():
        print(
            f"{name:40} {values['kl_divergence']:14.2e} {values['other_most_likely']:14.2%} "
            f"{values['perplexity']:11.4f}"
        )
    if args.json:
        report = {"file": args.file.name, "tokens": len(ids), "window": WINDOW, "found": found}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
