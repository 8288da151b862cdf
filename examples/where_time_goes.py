"""Where a training step's time goes: matmuls, waiting for other ranks, and everything else.

The same small model on 1, 2 and 4 ranks, one core per rank. What to look for:

- The matmul time of a rank shrinks as its share of the weights does; what is sent stays as large as
  it was. So the share of waiting grows with the number of ranks: more ranks are not simply faster.
- "hidden" is time from the start of a collective to the moment its result was needed: the gradient
  of a column-parallel layer's input is all-reduced while the gradient of its weight is computed.

How it is measured: matmuls by a timer around each; waiting by the ledger, as the time in which
rank 0 was blocked in a collective, be it for bytes or for a rank that came late; the rest is what
is left of the wall clock (attention, norms, activations, Python). On a
host with fewer cores than ranks the ranks take turns, and waiting is mostly that.
"""

import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from colrow import ModelConfig, ParallelGroup, from_config, init_mesh, record
from colrow.launch import launch, launched_by
from colrow.layers.options import RopeConfig

SIZES, STEPS, BATCH, SEQUENCE, BAR = (1, 2, 4), 3, 2, 128, 60
MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
CONFIG = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ffn_size=2048,
    max_positions=SEQUENCE,
    rope=RopeConfig(theta=10000.0, dims=64),
)


class MatmulTimer(TorchDispatchMode):
    """Adds up the seconds of every matmul that runs inside, forward and backward."""

    seconds = 0.0

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        started = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds += (time.perf_counter() - started) * (operation in MATMULS)
        return result


def measure(tp: ParallelGroup) -> tuple[float, float, float, float, float]:
    """Loss, then seconds per step: in all, in matmuls, waiting, and collectives hidden."""
    model = from_config(CONFIG, tp, seed=0)
    torch.manual_seed(0)
    input_ids = torch.randint(CONFIG.vocab_size, (BATCH, SEQUENCE))
    model.loss(input_ids, input_ids).backward()  # warms up
    with record(tp) as ledger, MatmulTimer() as matmuls:
        dist.barrier(tp.group)  # a rank's late start is no part of a step
        started = time.perf_counter()
        for _ in range(STEPS):
            loss = model.loss(input_ids, input_ids)
            loss.backward()
        seconds = time.perf_counter() - started
    waiting = ledger.seconds(exposed=True)
    hidden = ledger.seconds() - waiting
    steps = (seconds, matmuls.seconds, waiting, hidden)
    return loss.item(), *(total / STEPS for total in steps)


def main() -> bool:
    torch.set_num_threads(1)
    losses, holds = [], []
    for size in SIZES:
        mesh = init_mesh(tp=size, device="cpu")
        if mesh.dp.rank == 0:  # the first tp group works; the others keep out of its way
            loss, seconds, matmul, waiting, hidden = measure(mesh.tp)
            other = seconds - matmul - waiting
            losses.append(loss)
            holds.append(min(matmul, other) > 0 and (waiting > 0) == (size > 1))
            if mesh.tp.rank == 0:
                parts = (("#", matmul), ("=", waiting), (".", other))
                print(f"tp={size}  {1e3 * seconds:6.1f} ms per step, ", end="")
                print(f"{100 * matmul / seconds:3.0f}% matmul, ", end="")
                print(f"{100 * waiting / seconds:3.0f}% waiting for collectives ", end="")
                print(f"({1e3 * hidden:.1f} ms more were hidden)")
                print("      " + "".join(sign * round(BAR * s / seconds) for sign, s in parts))
        dist.barrier()
    if dist.get_rank() == 0:
        print("      # matmul   = waiting for collectives   . everything else")
        print(f"      {os.cpu_count()} cores: ranks beyond that number take turns")
    return all(holds) and max(losses, default=0) - min(losses, default=0) < 1e-5


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=max(SIZES))
    sys.exit(0 if all(results) else 1)
