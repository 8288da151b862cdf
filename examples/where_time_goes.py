"""Where a training step's time goes: matmuls, waiting for other ranks, and everything else.

The same small model on 1, 2 and 4 ranks, one core per rank. What to look for:
- The matmul time of a rank shrinks with its share of the weights; what is sent does not. So the
  share of waiting grows with the number of ranks: more ranks are not simply faster.
- "hidden" is time from the start of a collective to the moment its result was needed: the gradient
  of a column-parallel layer's input is all-reduced while the gradient of its weight is computed.

Matmuls are timed by a timer around each, waiting by the ledger (for bytes, or for a rank that came
late); the rest is what is left of the wall clock. On fewer cores than ranks the ranks take turns.
"""

import sys
import time

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from colrow import from_config, init_mesh, record
from colrow.launch import launch, launched_by

SIZES, STEPS, BATCH, SEQUENCE, BAR = (1, 2, 4), 3, 2, 128, 60
MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
CONFIG = {
    **{"model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "intermediate_size": 2048, "max_position_embeddings": SEQUENCE},
}


class MatmulTimer(TorchDispatchMode):
    """Adds up the seconds of every matmul that runs inside, forward and backward."""

    seconds = 0.0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        started = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds += (time.perf_counter() - started) * (operation in MATMULS)
        return result


def main() -> bool:
    torch.set_num_threads(1)
    losses, holds = [], []
    for size in SIZES:
        mesh = init_mesh(tp=size, device="cpu")
        if mesh.dp.rank > 0:  # the first tp group works; the others keep out of its way
            dist.barrier()
            continue
        model = from_config(CONFIG, mesh.tp, seed=0)
        input_ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE)
        model.loss(input_ids, input_ids).backward()  # warms up
        with record(mesh.tp) as ledger, MatmulTimer() as matmuls:
            dist.barrier(mesh.tp.group)  # a rank's late start is no part of a step
            started = time.perf_counter()
            for _ in range(STEPS):
                loss = model.loss(input_ids, input_ids)
                loss.backward()
            seconds = time.perf_counter() - started
        dist.barrier()
        matmul, waiting = matmuls.seconds / seconds, ledger.seconds(exposed=True) / seconds
        hidden = ledger.seconds() - ledger.seconds(exposed=True)
        losses.append(loss.item())
        holds.append(min(matmul, 1 - matmul - waiting) > 0 and (waiting > 0) == (size > 1))
        if mesh.tp.rank == 0:
            step, late = 1e3 * seconds / STEPS, 1e3 * hidden / STEPS
            print(f"tp={size} {step:6.1f} ms per step, {matmul:.0%} matmul,", end=" ")
            print(f"{waiting:.0%} waiting for collectives ({late:.1f} ms more were hidden)")
            parts = {"#": matmul, "=": waiting, ".": 1 - matmul - waiting}
            print("     " + "".join(sign * round(BAR * share) for sign, share in parts.items()))
    if dist.get_rank() == 0:
        print("     # matmul   = waiting for collectives   . everything else")
    return all(holds) and max(losses, default=0) - min(losses, default=0) < 1e-5


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=max(SIZES))
    sys.exit(0 if all(results) else 1)
