"""A real model: transformers' own class whole, split in place, read in parts, and the decoder."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.inplace.weights.meta import model_of
from colrow.verification.comparison import relative_error
from colrow.verification.reference import load_reference, precision
from tests.ranks import RankPool, run_world


def mesh_of(tp: ParallelGroup) -> Mesh:
    single = ParallelGroup.single
    return Mesh(tp, single("dp"), single("pp"), None, torch.get_default_device())


def four_ways(tp: ParallelGroup, path: Path, directory: Path) -> dict[str, Any]:
    ids = torch.randint(3, 49_000, (1, 12), generator=torch.Generator().manual_seed(0))
    model: Any = load_reference(path, torch.float64)
    elements = sum(p.numel() for p in model.parameters())
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), precision(torch.float64):
        whole = model(ids).logits
        tokens = model.generate(ids, **greedy)
    model = colrow.parallelize(model, mesh_of(tp))
    with torch.no_grad(), precision(torch.float64):
        split = model(ids).logits
        split_tokens = model.generate(ids, **greedy)
    held = sum(p.numel() for p in model.parameters())
    del model
    decoder = colrow.from_pretrained(path, mesh_of(tp), dtype=torch.float64)
    with torch.no_grad():
        local = decoder(ids)
    decoded = colrow.gather_from_tp(local, tp, partition=decoder.vocab)
    del decoder
    read = colrow.parallelize(directory, mesh_of(tp), dtype=torch.float64, sequence_parallel=True)
    with torch.no_grad(), precision(torch.float64):
        in_parts = read(ids).logits
    return {
        "read in parts": relative_error(in_parts, whole),
        "in place": relative_error(split, whole),
        "decoder": relative_error(decoded, split),
        "tokens": torch.equal(tokens, split_tokens),
        "held": held / elements,
    }


@pytest.fixture(scope="module")
def directory(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a directory with safetensors, in fp32."""
    target = tmp_path_factory.mktemp("smollm2") / "directory"
    command = [sys.executable, "-m", "colrow.cli", "convert", smollm2, target, "--to", "hf"]
    subprocess.run([str(part) for part in command], check=True)
    return target


@pytest.mark.slow
def test_smollm2_in_place_is_the_whole_model_and_the_decoder(
    ranks: RankPool, smollm2: Path, directory: Path
) -> None:
    for result in ranks(2, four_ways, smollm2, directory, timeout=600):
        assert result["in place"] < 1e-12
        assert result["decoder"] < 1e-12
        assert result["read in parts"] < 1e-12
        assert result["tokens"]
        assert result["held"] < 0.54  # of nine query heads one rank has six


def anonymous_memory() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def read_and_measure(directory: Path) -> dict[str, int]:
    """The bytes that a rank holds, and those that it took at most while it got there."""
    torch.set_num_threads(1)
    mesh = colrow.init_mesh(tp=2, device="cpu")
    model_of(directory, None)  # whatever is loaded when it is first used
    before, peak, running = anonymous_memory(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_memory())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    model = colrow.parallelize(directory, mesh)
    running = False
    thread.join()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"held": held, "peak": peak - before}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_takes_memory_for_the_whole_model(directory: Path) -> None:
    """It is 538 MB in fp32; the largest weight is 113 MB, of which a rank holds half.

    Memory is fullest in the backward pass of the check of a few tokens: the gradient of that half,
    and what its kernels and activations take.
    """
    for measured in run_world(2, read_and_measure, directory, timeout=300):
        print(measured)
        assert measured["held"] < 0.54 * 538e6
        assert measured["peak"] < measured["held"] + 200e6
