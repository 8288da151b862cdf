"""Your own module in your own loop: colrow's layers, FSDP2, any optimiser, clipping, checkpoints.

    python examples/train_your_own.py

Two tensor-parallel ranks hold the halves of each layer, two data-parallel ranks divide those halves
again with torch's fully_shard, and each pair works on half of the batch. What to look for:

- The module is ordinary torch code that takes `tp`; colrow's layers stand beside torch's own.
- fully_shard gets the dp dimension of the mesh alone: parameters are plain local tensors, so halves
  of 7 + 6 rows are divided and saved right.
- colrow.clip_grad_norm_ counts each gradient once, whoever holds it; torch's own would not.
- Half-way the training state is saved, and a second model goes on from it to the same loss.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import colrow
from colrow.launch import launch, launched_by

TP, DP, STEPS, FEATURES, HIDDEN = 2, 2, 40, 8, 13


class Regressor(nn.Module):
    def __init__(self, tp: colrow.ParallelGroup) -> None:
        super().__init__()
        self.up = colrow.ColumnParallelLinear(FEATURES, HIDDEN, tp, bias=True)
        self.down = colrow.RowParallelLinear(HIDDEN, FEATURES, tp, bias=True)
        self.norm = nn.LayerNorm(FEATURES)  # every rank holds it and computes the same

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


def build(mesh: colrow.Mesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)  # colrow's layers draw the same whole weights at any tp size
    model = Regressor(mesh.tp)
    fully_shard(model, mesh=mesh.device_mesh["dp"])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(
    mesh: colrow.Mesh, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> Tensor:
    batch = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(0))
    x = batch.chunk(DP)[mesh.dp.rank]  # the same for the ranks of a tp group
    for step in steps:
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        norm = colrow.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 and torch.distributed.get_rank() == 0:
            print(f"step {step:2}  loss {loss.item():.4f}  |grad| {norm.item():.3f}")
    return loss.detach()


def main(directory: str) -> bool:
    mesh = colrow.init_mesh(tp=TP, dp=DP, device="cpu")
    model, optimizer = build(mesh)
    checkpoints = colrow.TrainingCheckpoints(Path(directory), mesh)
    train(mesh, model, optimizer, range(STEPS // 2))
    checkpoints.save(STEPS // 2, model, optimizer, {"anything": "that JSON can hold"})
    loss = train(mesh, model, optimizer, range(STEPS // 2, STEPS))  # it is written meanwhile
    checkpoints.wait()
    again, its_optimizer = build(mesh)
    checkpoints.load(checkpoints.latest(), again, its_optimizer)
    return torch.equal(train(mesh, again, its_optimizer, range(STEPS // 2, STEPS)), loss)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        results = [main(place)] if launched_by() else launch(main, (place,), ranks=TP * DP)
    sys.exit(0 if all(results) else "the second run differs")
