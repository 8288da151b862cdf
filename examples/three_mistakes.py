"""Three classic mistakes of tensor parallelism, and what colrow says to each.

1. A full input into a row-parallel layer, which expects this rank's features.
2. Reducing in the wrong place: before gelu, before a bias, before a loss on divided logits.
3. Dimensions that do not fit together.
Some mistakes have a shape, and colrow stops them; others no library sees: the right number beside.
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
    try:
        mistake()
    except ValueError as error:
        return f"ValueError: {error}"
    raise RuntimeError("no error")


def silent(wrong: Tensor, right: Tensor, why: str) -> str:
    assert not torch.allclose(wrong, right, atol=0.01)
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
    # A row-parallel layer by hand.
    wide, weight, bias = torch.randn(TOKENS, FFN), torch.randn(HIDDEN, FFN), torch.ones(HIDDEN)
    whole = F.linear(wide, weight)
    start, stop = Partition.even(FFN, RANKS).bounds[tp.rank]
    partial = F.linear(wide[:, start:stop], weight[:, start:stop])  # this rank's part of a sum
    logits, labels = torch.randn(TOKENS, VOCAB), torch.arange(TOKENS)
    repeated = torch.cat([logits] * RANKS, dim=-1)  # what the ranks' "shards" amount to

    found = {
        "1. a full input into a row-parallel layer": refused(lambda: down(gathered(x))),
        "2. gelu on partial sums, by hand": silent(
            *(reduce_from_tp(F.gelu(partial), tp), F.gelu(whole)),
            "gelu(a) + gelu(b) is not gelu(a + b). RowParallelLinear returns the finished sum.",
        ),
        "2. a bias added by every rank before the sum, by hand": silent(
            *(reduce_from_tp(partial + bias, tp), whole + bias),
            f"The sum has the bias {RANKS} times. RowParallelLinear adds it once, after the sum.",
        ),
        "2. gathered logits in a vocabulary-parallel loss, by hand": silent(
            *(F.cross_entropy(repeated, labels), F.cross_entropy(logits, labels)),
            f"Every token is in the sum {RANKS} times: the loss is too large by log({RANKS}).",
        ),
        "2. gathered logits in colrow's own loss": refused(
            lambda: colrow.vocab_parallel_cross_entropy(logits, labels, tp)
        ),
        "3. two layers that divide the same features differently": refused(lambda: other(up(x))),
        "3. an input of the wrong size": refused(lambda: up(wide)),
        "3. more ranks than heads": refused(lambda: HeadPartition.create(4, 4, parts=8)),
    }
    for mistake, text in found.items() if tp.rank == 0 else ():
        print(mistake, textwrap.indent(textwrap.fill(text, 93), "   "), sep="\n")


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    main() if launched_by() else launch(main, ranks=RANKS)
