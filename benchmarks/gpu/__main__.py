"""Measures one rank's work on a GPU: ``python -m benchmarks.gpu``, from the repository's root."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import blocks, ceiling, decoding, loss, report
from benchmarks.gpu.shapes import dtype_of, leave, shares
from benchmarks.gpu.timing import Timer

PARTS = ("blocks", "loss", "decoding")
_RESULTS = Path(__file__).parent / "results" / "results.json"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --device cpu --small tries the program")
        return 2
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    target = Path(options.json or _RESULTS)
    if device.type == "cpu" and options.json is None:
        print("--device cpu writes to --json FILE alone: results are those of a GPU")
        return 2
    dtype = dtype_of(options.dtype)
    timer = Timer(device, options.turns, flush=not options.keep_l2)
    found: dict[str, Any] = {
        "environment": report.environment(device),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *(arguments or sys.argv[1:])]),
        "dtype": options.dtype,
        "turns": options.turns,
        "l2_flushed": device.type == "cuda" and not options.keep_l2,
        "small": options.small,
        "seconds": "every sample, of each phase",
    }
    print("measuring the ceilings", flush=True)
    found["ceiling"] = limits = ceiling.measure(timer, dtype, options.small)
    _write(found, target)
    try:
        for part, name, measure in _work(options, timer, dtype, limits):
            print(f"measuring {part}: {name}", flush=True)
            found.setdefault(part, []).append(measure())
            _write(found, target)  # what is there, should the rest not come
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        leave()
    print(report.markdown(found))
    return 0


def _work(options: argparse.Namespace, timer: Timer, dtype: torch.dtype, limits: Any) -> Any:
    """(part, name, what measures it), in order."""
    small = options.small
    for share in shares(small) if "blocks" in options.only else ():
        yield (
            "blocks",
            share.label,
            lambda share=share: blocks.measure(
                share,
                timer,
                dtype,
                limits["matmul_teraflops"],
                compiled=not options.no_compile,
            ),
        )
    vocabulary = 512 if small else loss.VOCABULARY
    for tokens in ((16,) if small else loss.TOKENS) if "loss" in options.only else ():
        yield (
            "loss",
            f"{tokens} tokens",
            lambda tokens=tokens: loss.measure(tokens, timer, dtype, vocabulary=vocabulary),
        )
    for share in shares(small)[:2] if "decoding" in options.only else ():
        for batch in (1, 16):
            yield (
                "decoding",
                f"{share.name}, batch {batch}",
                lambda share=share, batch=batch: decoding.measure(
                    share,
                    timer,
                    dtype,
                    limits["memory_gigabytes_per_second"],
                    batch=batch,
                    cached=8 if small else 2048,
                    layers=min(options.layers, share.config.num_layers),
                ),
            )


def _write(found: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(report.markdown(found) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--json", metavar="FILE", help="default: benchmarks/gpu/results")
    parser.add_argument("--turns", type=int, default=20, help="samples of each contestant")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layers", type=int, default=1000, help="of the decoders, at most")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--keep-l2", action="store_true", help="do not empty the L2 cache")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
