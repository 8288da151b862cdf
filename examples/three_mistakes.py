"""Three classic mistakes of tensor parallelism, and what colrow says to each.

1. A full input into a row-parallel layer, which expects this rank's features.
2. Reducing in the wrong place: gelu on partial sums; a bias added by every rank before the sum;
   logits gathered before a loss that wants them divided.
3. Dimensions that do not fit together.

What to look for: some mistakes have a shape, and colrow stops them with an error before anything is
sent. Others are arithmetic between layers, which no library sees in hand-written code; those give a
wrong number without a word. They are shown next to the right number, with what prevents them.
"""

import textwrap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import colrow
from colrow import ColumnParallelLinear, HeadPartition, Partition, RowParallelLinear, reduce_from_tp
from colrow.launch import launch, launched_by

RANKS, TOKENS, HIDDEN, FFN, VOCAB = 2, 5, 8, 12, 20


def refused(mistake: Callable[[], object]) -> str:
    """What colrow says to it."""
    try:
        mistake()
    except ValueError as error:
        return f"ValueError: {error}"
    raise RuntimeError("no error")


def silent(wrong: Tensor, right: Tensor, why: str) -> str:
    """By how much the number is wrong."""
    if torch.allclose(wrong, right, atol=0.01):
        raise RuntimeError("not wrong")
    return f"wrong: {wrong.sum().item():.4f}, right: {right.sum().item():.4f}. {why}"


def main() -> None:
    tp = colrow.init_mesh(tp=RANKS, device="cpu").tp
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN)
    up = ColumnParallelLinear(HIDDEN, FFN, tp, bias=False, layer="up")
    gathered = ColumnParallelLinear(HIDDEN, FFN, tp, bias=False, gather_output=True, layer="up")
    down = RowParallelLinear(FFN, HIDDEN, tp, bias=False, layer="down")
    uneven = Partition.from_sizes([8, 4])
    other = RowParallelLinear(FFN, HIDDEN, tp, bias=False, partition=uneven, layer="down")

    # For the second mistake: a row-parallel layer by hand.
    wide, weight, bias = torch.randn(TOKENS, FFN), torch.randn(HIDDEN, FFN), torch.ones(HIDDEN)
    start, stop = Partition.even(FFN, RANKS).bounds[tp.rank]
    partial = F.linear(wide[:, start:stop], weight[:, start:stop])  # this rank's part of a sum
    logits, labels = torch.randn(TOKENS, VOCAB), torch.arange(TOKENS)
    repeated = torch.cat([logits] * RANKS, dim=-1)  # what the ranks' "shards" amount to

    found = {
        "1. a full input into a row-parallel layer": refused(lambda: down(gathered(x))),
        "2. gelu on partial sums, by hand": silent(
            reduce_from_tp(F.gelu(partial), tp),
            F.gelu(F.linear(wide, weight)),
            "gelu(a) + gelu(b) is not gelu(a + b). RowParallelLinear returns the finished sum.",
        ),
        "2. a bias added by every rank before the sum, by hand": silent(
            reduce_from_tp(partial + bias, tp),
            F.linear(wide, weight, bias),
            f"The sum has the bias {RANKS} times. RowParallelLinear adds it once, after the sum.",
        ),
        "2. gathered logits in a vocabulary-parallel loss, by hand": silent(
            F.cross_entropy(repeated, labels),
            F.cross_entropy(logits, labels),
            f"Every token is in the sum {RANKS} times, so the loss is too large by log({RANKS}).",
        ),
        "2. gathered logits in colrow's vocabulary-parallel loss": refused(
            lambda: colrow.vocab_parallel_cross_entropy(logits, labels, tp)
        ),
        "3. two layers that divide the same features differently": refused(lambda: other(up(x))),
        "3. an input of the wrong size": refused(lambda: up(wide)),
        "3. more ranks than heads": refused(lambda: HeadPartition.create(4, 4, parts=8)),
    }
    if tp.rank == 0:
        for mistake, text in found.items():
            print(mistake)
            print(textwrap.indent(textwrap.fill(text, 93, break_on_hyphens=False), "   "))


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    main() if launched_by() else launch(main, ranks=RANKS)
