"""Why columns first and rows second: the MLP with one all-reduce per direction, and the naive one.

Both MLPs compute y = W2 gelu(W1 x) with the same weights over two ranks. The naive one makes both
layers column-parallel and gathers the full result after each. What to look for:

- Column-then-row leaves the wide hidden features where they are: gelu works on each feature alone,
  and the row-parallel layer wants exactly the features that the column-parallel one left here.
  So nothing is sent between the two layers.
- The naive MLP needs 4 collectives instead of 2, two of them on the wide features: with ffn = 4 x
  hidden each rank sends 3.75 times the bytes (in the ring algorithm; see Call.wire_bytes).

Shoeybi et al. 2019, "Megatron-LM", section 3. The times are of this host's processes and memory,
and include waiting for the other rank; what carries over to any machine is counts and bytes.
"""

import statistics
import sys
import time

import torch
from rich import print
from rich.table import Table
from torch import nn

from colrow import ColumnParallelLinear, ParallelGroup, RowParallelLinear, init_mesh, record
from colrow.launch import launch, launched_by

RANKS, TOKENS, HIDDEN, FFN, STEPS = 2, 256, 384, 1536, 5


def column_then_row(tp: ParallelGroup) -> nn.Module:
    up = ColumnParallelLinear(HIDDEN, FFN, tp, bias=False, layer="up")
    down = RowParallelLinear(FFN, HIDDEN, tp, bias=False, layer="down")
    return nn.Sequential(up, nn.GELU(), down)  # [tokens, ffn / ranks] in between


def gather_after_each(tp: ParallelGroup) -> nn.Module:
    up = ColumnParallelLinear(HIDDEN, FFN, tp, bias=False, gather_output=True, layer="up")
    down = ColumnParallelLinear(FFN, HIDDEN, tp, bias=False, gather_output=True, layer="down")
    return nn.Sequential(up, nn.GELU(), down)  # [tokens, ffn] in between


def main() -> bool:
    tp, alone = init_mesh(tp=RANKS, device="cpu").tp, ParallelGroup.single()
    torch.manual_seed(0)
    x, y_grad = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    table = Table("one step, rank 0", "collectives", "MB sent", "ms waiting", "ms")
    outputs, counts, sent = [], [], []
    # The first is the reference: on a group of one rank the same layers are dense.
    for make, group in ((column_then_row, alone), (column_then_row, tp), (gather_after_each, tp)):
        torch.manual_seed(1)  # the same seed gives the same whole weights however they are divided
        mlp = make(group)
        waiting, seconds = [], []
        for _ in range(STEPS):
            my_x = x.clone().requires_grad_()
            with record(group) as ledger:
                started, y = time.perf_counter(), mlp(my_x)
                y.backward(y_grad)
                seconds.append(time.perf_counter() - started)
            waiting.append(ledger.seconds(exposed=True))
        outputs.append(torch.stack([y.detach(), my_x.grad]))
        counts.append(len(ledger.calls))
        sent.append(sum(call.wire_bytes(group.size) for call in ledger.calls))
        times = [f"{1e3 * statistics.median(s):.1f}" for s in (waiting, seconds)]
        name = f"{make.__name__}, {group.size} rank{'s' * (group.size > 1)}"
        table.add_row(name, str(counts[-1]), f"{sent[-1] / 1e6:.2f}", *times)
        for call in ledger.calls:
            size = f"{call.wire_bytes(group.size) / 1e6:.2f}"
            table.add_row(f"- {call.phase}: {call.op} of {call.layer}", "", size)
    dense, *parallel = outputs
    worst = max(((mine - dense).norm() / dense.norm()).item() for mine in parallel)
    if tp.rank == 0:
        print(table, f"largest difference from one rank (y and x gradient): {worst:.1e}", sep="\n")
    return worst < 1e-5 and counts == [0, 2, 4] and sent[2] == 3.75 * sent[1]


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=RANKS)
    sys.exit(0 if all(results) else 1)
