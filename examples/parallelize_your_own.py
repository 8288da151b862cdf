"""Your own module, tensor-parallel with one call, and without a word about how it is built.

    python examples/parallelize_your_own.py

What to look for:

- Nothing of colrow or transformers is in the model: plain torch, with Q, K and V fused in one
  matrix, 5 heads, a gated MLP of 101 features and a vocabulary of 97. None of it divides by 2.
- colrow.plan_for finds out by itself what may be split and how, and says why; what it cannot prove
  stays whole and is listed.
- Training the split model gives the losses of the whole one, and colrow.full_state_dict the same
  weights.
"""

import sys

import torch
from torch import Tensor, nn

import colrow
from colrow.launch import launch

RANKS, STEPS, TOLERANCE = 2, 5, 1e-10
VOCABULARY, WIDTH, HEADS, FEATURES = 97, 40, 5, 101


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, FEATURES)
        self.up = nn.Linear(WIDTH, FEATURES)
        self.down = nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), GatedMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(ids))))


def make_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def train(model: nn.Module, ids: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def on_a_rank() -> tuple[list[float], list[str], int, dict[str, Tensor]]:
    """Losses, the plan's lines, the elements that this rank holds, and the weights on rank 0."""
    mesh = colrow.init_mesh(tp=RANKS, device="cpu")
    ids = batch()
    plan = colrow.plan_for(make_model(), RANKS, example_inputs={"ids": ids})
    model = colrow.parallelize(make_model(), mesh, example_inputs={"ids": ids})
    losses = train(model, ids)
    lines = [f"{name}: {style}" for name, style in plan.items()]
    held = sum(parameter.numel() for parameter in model.parameters())
    return losses, lines, held, colrow.full_state_dict(model)


def batch() -> Tensor:
    return torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


def main() -> int:
    whole = make_model()
    expected = train(whole, batch())
    results = launch(on_a_rank, ranks=RANKS)
    losses, lines, _, weights = results[0]
    print("\n".join(lines))
    elements = sum(parameter.numel() for parameter in whole.parameters())
    for rank, (_, _, held, _) in enumerate(results):
        print(f"rank {rank} holds {held} of {elements} elements")
    worst = 0.0
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        print(f"step {step}  loss {ours:.12f}  whole {theirs:.12f}")
        worst = max(worst, abs(ours - theirs))
    for name, parameter in whole.named_parameters():
        worst = max(worst, (weights[name] - parameter.detach()).abs().max().item())
    print(f"largest difference of a loss or a weight after training: {worst:.1e}")
    print("The split model trained as the whole one." if worst < TOLERANCE else "They differ.")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
