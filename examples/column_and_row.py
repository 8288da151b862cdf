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
from torch import Tensor, nn

from colrow import ColumnParallelLinear, Partition, RowParallelLinear, init_mesh, record
from colrow.launch import launch, launched_by

RANKS, TOKENS, FEATURES, WIDTH = 2, 3, 7, 6
TOLERANCE = 1e-12  # float64: a real mistake has nowhere to hide


def difference(mine: Tensor | None, dense: Tensor | None) -> float:
    assert mine is not None and dense is not None and mine.shape == dense.shape
    return ((mine - dense).norm() / dense.norm()).item()


def main() -> bool:
    tp = init_mesh(tp=RANKS, device="cpu").tp
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # every rank draws the same dense layers, inputs and output gradients
    start, stop = Partition.even(FEATURES, RANKS).bounds[tp.rank]  # rank 0: 0 to 4, rank 1: 4 to 7
    checks = []

    # Column-parallel: rank r computes y[..., start:stop] from the whole x.
    dense = nn.Linear(WIDTH, FEATURES)
    column = ColumnParallelLinear(WIDTH, FEATURES, tp, bias=True, layer="column")
    with torch.no_grad():
        column.weight.copy_(dense.weight[start:stop])
        column.bias.copy_(dense.bias[start:stop])
    x, y_grad = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, FEATURES)
    my_x = x.detach().clone().requires_grad_()
    y = dense(x)
    y.backward(y_grad)
    with record(tp) as ledger:
        my_y = column(my_x)
        my_y.backward(y_grad[:, start:stop].contiguous())
    checks += [
        ("column: y, my features", my_y, y[:, start:stop]),
        ("column: x gradient", my_x.grad, x.grad),
        ("column: weight gradient, my rows", column.weight.grad, dense.weight.grad[start:stop]),
        ("column: bias gradient, my part", column.bias.grad, dense.bias.grad[start:stop]),
    ]

    # Row-parallel: rank r reads only x[..., start:stop]; the partial results are summed.
    dense = nn.Linear(FEATURES, WIDTH)
    row = RowParallelLinear(FEATURES, WIDTH, tp, bias=True, layer="row")
    with torch.no_grad():
        row.weight.copy_(dense.weight[:, start:stop])
        row.bias.copy_(dense.bias)
    x, y_grad = torch.randn(TOKENS, FEATURES, requires_grad=True), torch.randn(TOKENS, WIDTH)
    my_x = x.detach()[:, start:stop].clone().requires_grad_()
    y = dense(x)
    y.backward(y_grad)
    with record(tp) as row_ledger:
        my_y = row(my_x)
        my_y.backward(y_grad)
    checks += [
        ("row: y, whole", my_y, y),
        ("row: x gradient, my features", my_x.grad, x.grad[:, start:stop]),
        ("row: weight gradient, my columns", row.weight.grad, dense.weight.grad[:, start:stop]),
        ("row: bias gradient, whole", row.bias.grad, dense.bias.grad),
    ]

    table = Table("rank 0 of 2", "shape here", "difference from dense")
    for name, mine, whole in checks:
        table.add_row(name, str(list(mine.shape)), f"{difference(mine, whole):.1e}")
    sent = [f"{c.layer}: {c.op} in {c.phase}" for c in ledger.calls + row_ledger.calls]
    if tp.rank == 0:
        print(column, row, table, f"sent: {', '.join(sent)}", sep="\n")
    return sent == ["column: all_reduce in backward", "row: all_reduce in forward"] and all(
        difference(mine, whole) < TOLERANCE for _, mine, whole in checks
    )


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=RANKS)
    sys.exit(0 if all(results) else 1)
