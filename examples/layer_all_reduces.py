"""The all-reduces of one whole transformer layer: predicted by hand, by colrow, and recorded.

A layer with hidden size 4096 and 12 heads on 4 ranks. What to look for:

- Two all-reduces in forward (after attention's output projection and after the MLP's second
  layer, both row-parallel) and two in backward (the input gradients of the Q/K/V projection and of
  the MLP's first layer, both column-parallel). Each moves [batch, sequence, hidden], whatever the
  number of heads and the width of the MLP.
- With sequence parallelism each all-reduce becomes an all-gather and a reduce-scatter, which are
  the two halves of a ring all-reduce: twice the collectives, the same bytes on the wire.

4096 / 12 is no whole number, so hidden size / heads cannot be the size of a head here. It need not
be: the heads meet the hidden features only through two projections, here 4096 -> 12 x 128 = 1536
and 1536 -> 4096. That is why colrow's configuration has head_dim as a number of its own. Each rank
gets 3 heads; 12 heads on 5 ranks would be 3, 3, 2, 2 and 2.
"""

import sys
from collections import Counter

import torch
from rich import print
from rich.table import Table

from colrow import Decoder, init_mesh, record
from colrow.launch import launch, launched_by
from colrow.models.communication import predict_step
from colrow.models.compose import decoder

RANKS, BATCH, SEQUENCE, HIDDEN = 4, 1, 32, 4096
CONFIG = decoder(
    family="gpt2",
    vocab_size=64,
    hidden_size=HIDDEN,
    num_layers=1,
    **{"num_heads": 12, "num_kv_heads": 12, "head_dim": 128, "ffn_size": 4 * HIDDEN},
    max_positions=SEQUENCE,
    position="learned",
    gated=False,
)
BY_HAND = BATCH * SEQUENCE * HIDDEN * 2  # one activation in bfloat16


def main() -> bool:
    tp = init_mesh(tp=RANKS, device="cpu").tp
    input_ids = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    shape = {"batch": BATCH, "sequence": SEQUENCE, "dtype": "bfloat16"}
    holds = []
    for count, mode in ((2, {"sequence_parallel": False}), (4, {"sequence_parallel": True})):
        model = Decoder(CONFIG, tp, dtype=torch.bfloat16, **mode)
        for parameter in model.parameters():  # what is sent does not depend on the values
            torch.nn.init.zeros_(parameter)
        with record(tp) as ledger:
            model.loss(input_ids, input_ids).backward()
        recorded = [call for call in ledger.calls if call.layer.startswith("blocks.0.")]
        prediction = predict_step(CONFIG, CONFIG.divide(RANKS), **shape, **mode)
        predicted = [call for call in prediction if call.layer.startswith("blocks.0.")]
        title = f"sequence parallelism {'on' if count == 4 else 'off'}, rank 0 of {RANKS}"
        table = Table("direction", "layer", "collective", "bytes", "on the wire", title=title)
        for direction in ("forward", "backward"):
            calls = [call for call in recorded if call.phase == direction]
            for call in calls:
                sizes = f"{call.bytes:,}", f"{call.wire_bytes(RANKS):,.0f}"
                table.add_row(direction, call.layer.removeprefix("blocks.0."), call.op, *sizes)
            wire_bytes = sum(call.wire_bytes(RANKS) for call in calls)
            table.add_row(direction, "", f"{len(calls)} in all", "", f"{wire_bytes:,.0f}")
            table.add_section()
            holds.append(len(calls) == count and all(call.bytes == BY_HAND for call in calls))
            holds.append(wire_bytes == 2 * 2 * (RANKS - 1) / RANKS * BY_HAND)
        holds.append(Counter(recorded) == Counter(predicted))
        same = "the same" if holds[-1] else "NOT the same"
        if tp.rank == 0:
            print(table, f"predicted and recorded: {same}; by hand: {BY_HAND:,} bytes each\n")
    return all(holds)


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=RANKS)
    sys.exit(0 if all(results) else 1)
