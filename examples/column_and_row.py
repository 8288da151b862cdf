"""A column-parallel and a row-parallel linear layer against the dense layers they are cut from.

Two ranks cut the same two dense layers by hand. What to look for:
- The shapes. torch stores a weight as [out, in]. Column-parallel divides the output features, so
  it keeps rows of that matrix; row-parallel divides the input features and keeps columns. (The
  names come from y = x A, where A is the transpose.) 7 features over 2 ranks are 4 and 3.
- What is sent. The column-parallel layer sends nothing in forward and all-reduces the gradient of
  its input in backward. The row-parallel layer does it the other way round.
- The differences. What the ranks have is put together (torch.cat) and compared with the dense
  layer: outputs, input gradients and weight gradients.
"""

import sys

import torch
import torch.distributed as dist
from rich import print
from rich.table import Table
from torch import Tensor, nn

import colrow
from colrow.launch import launch, launched_by

RANKS, TOKENS, FEATURES, WIDTH = 2, 3, 7, 6
TOLERANCE = 1e-12  # float64: a real mistake has nowhere to hide


def together(here: Tensor, dim: int | None, tp: colrow.ParallelGroup) -> Tensor:
    """The ranks' parts one behind the other; None is for what every rank has whole."""
    if dim is None:
        return here
    parts = [here] * RANKS
    dist.all_gather_object(parts, here.detach(), group=tp.group)
    return torch.cat(parts, dim=dim)


def main() -> bool:
    tp = colrow.init_mesh(tp=RANKS, device="cpu").tp
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)  # every rank draws the same dense layers, inputs and output gradients
    start, stop = colrow.Partition.even(FEATURES, RANKS).bounds[tp.rank]  # 0 to 4, 4 to 7
    mine, whole = slice(start, stop), slice(None)
    column = colrow.ColumnParallelLinear(WIDTH, FEATURES, tp, bias=True, layer="column")
    row = colrow.RowParallelLinear(FEATURES, WIDTH, tp, bias=True, layer="row")
    sent, differences = [], []
    table = Table("rank 0 of 2", "shape here", "put together", "difference from dense")
    # By columns: rank r computes y[..., start:stop]. By rows: it reads only x[..., start:stop].
    for layer, inputs, outputs in ((column, whole, mine), (row, mine, whole)):
        dense = nn.Linear(layer.in_features, layer.out_features)
        layer.weight.data.copy_(dense.weight[outputs, inputs])
        layer.bias.data.copy_(dense.bias[outputs])
        x = torch.randn(TOKENS, layer.in_features, requires_grad=True)
        my_x = x.detach()[:, inputs].clone().requires_grad_()
        y, y_grad = dense(x), torch.randn(TOKENS, layer.out_features)
        y.backward(y_grad)
        with colrow.record(tp) as ledger:
            my_y = layer(my_x)
            my_y.backward(y_grad[:, outputs].contiguous())
        pairs = {
            "y": (my_y, 1 if layer is column else None, y),
            "x gradient": (my_x.grad, None if layer is column else 1, x.grad),
            "weight gradient": (layer.weight.grad, 0 if layer is column else 1, dense.weight.grad),
            "bias gradient": (layer.bias.grad, 0 if layer is column else None, dense.bias.grad),
        }
        for name, (here, divided, dense_one) in pairs.items():
            both = together(here, divided, tp)
            differences.append(((both - dense_one).norm() / dense_one.norm()).item())
            cells = f"{[*here.shape]}", f"{[*both.shape]}", f"{differences[-1]:.1e}"
            table.add_row(f"{layer.layer}: {name}", *cells)
        sent += [f"{call.layer}: {call.op} in {call.phase}" for call in ledger.calls]
    if tp.rank == 0:
        print(column, row, table, f"sent: {', '.join(sent)}", sep="\n")
    expected = ["column: all_reduce in backward", "row: all_reduce in forward"]
    return sent == expected and all(difference < TOLERANCE for difference in differences)


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=RANKS)
    sys.exit(0 if all(results) else 1)
