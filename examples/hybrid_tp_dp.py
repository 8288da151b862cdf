"""Tensor parallelism inside, data parallelism outside: one training step on a 2 x 2 grid of ranks.

Ranks 0 and 1 hold the two halves of the model, ranks 2 and 3 the same two halves again. Each pair
works on half of the batch. What to look for:

- Two kinds of groups: mesh.tp (0 1 and 2 3) exchanges activations in every layer, mesh.dp (0 2 and
  1 3) averages gradients once per step. Every gradient has the size of a shard, so data
  parallelism too sends only about half as much.
- torch's DistributedDataParallel does the second part unchanged: colrow's parameters are plain
  tensors, and all it needs is the group.
- Loss, gradients and updated weights are those of one process that sees the whole batch.
"""

import sys

import torch
from rich import print
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import colrow
from colrow.comm import primitives
from colrow.launch import launch, launched_by

TP, DP, BATCH, SEQUENCE, TOLERANCE = 2, 2, 4, 16, 1e-12
CONFIG = {  # nothing has to divide: a vocabulary of 51 + 50
    **{"model_type": "llama", "vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2},
    "num_attention_heads": 3,  # 2 + 1
    "num_key_value_heads": 1,  # held by both ranks; its gradient is their sum
    "intermediate_size": 129,
    "max_position_embeddings": SEQUENCE,
}


def difference(mine: dict[str, Tensor], whole: dict[str, Tensor]) -> float:
    return max(((mine[n] - whole[n]).norm() / whole[n].norm()).item() for n in whole)


def main() -> bool:
    mesh = colrow.init_mesh(tp=TP, dp=DP, device="cpu")
    torch.manual_seed(0)
    batch = torch.randint(CONFIG["vocab_size"], (BATCH, SEQUENCE))
    mine = batch.chunk(DP)[mesh.dp.rank]  # the same for the ranks of a tp group
    model = colrow.from_config(CONFIG, mesh, seed=0, dtype=torch.float64)
    replicated = DistributedDataParallel(model, process_group=mesh.dp.group)
    logits = replicated(mine)  # [batch / dp, sequence, vocab / tp]
    loss = colrow.vocab_parallel_cross_entropy(logits[:, :-1], mine[:, 1:], mesh.tp)
    with colrow.record(mesh.tp) as ledger:
        loss.backward()
    torch.optim.AdamW(model.parameters()).step()
    mean_loss = primitives.all_reduce(loss.detach(), mesh.dp) / DP
    reference = colrow.from_config(CONFIG, seed=0, dtype=torch.float64)  # one process
    reference_loss = reference.loss(batch, batch)
    reference_loss.backward()
    torch.optim.AdamW(reference.parameters()).step()
    gradients, weights = colrow.full_grads(model), colrow.full_state_dict(model)
    if mesh.tp.rank != 0:  # the whole tensors come together on tp rank 0
        return True
    table = Table(f"tp={TP} x dp={DP} against one process", "largest difference")
    differences = {
        "loss": abs(mean_loss.item() / reference_loss.item() - 1),
        "gradients": difference(gradients, colrow.full_grads(reference)),
        "weights after the step": difference(weights, colrow.full_state_dict(reference)),
    }
    for name, value in differences.items():
        table.add_row(name, f"{value:.1e}")
    if mesh.dp.rank == 0:
        held, total = (sum(p.numel() for p in m.parameters()) for m in (model, reference))
        print(table, f"rank 0 holds {held:,} of {total:,} parameters", sep="\n")
        print(f"its tp group sent {len(ledger.calls)} collectives in backward: 2 per layer, one of")
        print("the head, and one for the gradient of the KV head that both ranks hold")
    return max(differences.values()) < TOLERANCE


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    results = [main()] if launched_by() else launch(main, ranks=TP * DP)
    sys.exit(0 if all(results) else 1)
