"""Your own module, tensor-parallel with one call, and without a word about how it is built.

What to look for:
- Nothing of colrow or transformers is in the model: plain torch, with Q, K and V fused in one
  matrix, 5 heads, an MLP of 101 features and a vocabulary of 97. None of it divides by 2.
- colrow finds what may be split; training it gives the losses and weights of the whole model.
"""

import sys

import torch
from torch import Tensor, nn

import colrow
from colrow.launch import launch

RANKS, STEPS, TOLERANCE = 2, 5, 1e-10
VOCABULARY, WIDTH, HEADS, FEATURES = 97, 40, 5, 101


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before_attention(x)).chunk(3, dim=-1)
        q, k, v = (t.view(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Layer(), Layer(), *head).double()


def train(model: nn.Module, ids: Tensor) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = model(ids)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def on_a_rank(ids: Tensor) -> tuple[list[float], dict[str, str], int, dict[str, Tensor]]:
    mesh = colrow.init_mesh(tp=RANKS, device="cpu")
    plan = colrow.plan_for(make_model(), RANKS, example_inputs={"input": ids})
    model = colrow.parallelize(make_model(), mesh, example_inputs={"input": ids})
    held = sum(parameter.numel() for parameter in model.parameters())
    return train(model, ids), dict(plan), held, colrow.full_state_dict(model)


def main() -> int:
    whole, ids = make_model(), torch.arange(22).view(2, 11)
    elements = sum(p.numel() for p in whole.parameters())
    results, expected = launch(on_a_rank, (ids,), ranks=RANKS), train(whole, ids)
    losses, plan, _, weights = results[0]
    print(*(f"{name}: {style}" for name, style in plan.items()), sep="\n")
    print(*(f"rank {r} holds {one[2]} of {elements} elements," for r, one in enumerate(results)))
    worst = max((weights[n] - p).abs().max().item() for n, p in whole.named_parameters())
    for ours, theirs in zip(losses, expected, strict=True):
        print(f"loss {ours:.12f}  whole {theirs:.12f}")
        worst = max(worst, abs(ours - theirs))
    verdict = "trained as the whole one." if worst < TOLERANCE else "differs."
    print(f"The split model {verdict} Largest difference: {worst:.1e}")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
