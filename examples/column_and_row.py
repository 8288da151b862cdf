"""A column-parallel and a row-parallel linear layer against the dense layers they are cut from.

Two ranks cut the same two dense layers by hand. What to look for:

- The shapes. torch stores a weight as [out, in]. Column-parallel divides the output features, so
  it keeps rows of that matrix; row-parallel divides the input features and keeps columns. (The
  names come from y = x A, where A is the transpose.) 7 features over 2 ranks are 4 and 3.
- What is sent. The column-parallel layer sends nothing in forward and all-reduces the gradient of
  its input in backward. The row-parallel layer does it the other way round.
- The differences. Forward, input gradient and weight gradients are those of the dense layer.
"""

import sys

import torch
from rich import print
from rich.table import Table
from torch import nn

from colrow import ColumnParallelLinear, Partition, RowParallelLinear, init_mesh, record
from colrow.launch import launch, launched_by

RANKS, TOKENS, FEATURES, WIDTH = 2, 3, 7, 6
TOLERANCE = 1e-12  # float64: a real mistake has nowhere to hide


def main() -> bool:
    tp = init_mesh(tp=RANKS, device="cpu").tp
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # every rank draws the same dense layers, inputs and output gradients
    start, stop = Partition.even(FEATURES, RANKS).bounds[tp.rank]  # rank 0: 0 to 4, rank 1: 4 to 7
    mine, whole = slice(start, stop), slice(None)
    column = ColumnParallelLinear(WIDTH, FEATURES, tp, bias=True, layer="column")
    row = RowParallelLinear(FEATURES, WIDTH, tp, bias=True, layer="row")
    table = Table("rank 0 of 2", "shape here", "difference from dense")
    sent, differences = [], []

    # Column-parallel: rank r computes y[..., start:stop] from the whole x. Row-parallel: it reads
    # only x[..., start:stop], and the partial results are summed.
    for layer, inputs, outputs in ((column, whole, mine), (row, mine, whole)):
        dense = nn.Linear(layer.in_features, layer.out_features)
        with torch.no_grad():
            layer.weight.copy_(dense.weight[outputs, inputs])
            layer.bias.copy_(dense.bias[outputs])
        x = torch.randn(TOKENS, layer.in_features, requires_grad=True)
        my_x = x.detach()[:, inputs].clone().requires_grad_()
        y_grad = torch.randn(TOKENS, layer.out_features)
        y = dense(x)
        y.backward(y_grad)
        with record(tp) as ledger:
            my_y = layer(my_x)
            my_y.backward(y_grad[:, outputs].contiguous())
        pairs = {
            "y": (my_y, y[:, outputs]),
            "x gradient": (my_x.grad, x.grad[:, inputs]),
            "weight gradient": (layer.weight.grad, dense.weight.grad[outputs, inputs]),
            "bias gradient": (layer.bias.grad, dense.bias.grad[outputs]),
        }
        for name, (here, there) in pairs.items():
            differences.append(((here - there).norm() / there.norm()).item())
            table.add_row(f"{layer.layer}: {name}", f"{[*here.shape]}", f"{differences[-1]:.1e}")
        sent += [f"{call.layer}: {call.op} in {call.phase}" for call in ledger.calls]
    if tp.rank == 0:
        print(column, row, table, f"sent: {', '.join(sent)}", sep="\n")
    expected = ["column: all_reduce in backward", "row: all_reduce in forward"]
    return sent == expected and all(difference < TOLERANCE for difference in differences)


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=RANKS)
    sys.exit(0 if all(results) else 1)
