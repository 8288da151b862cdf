"""Fine-tune a transformers model over two ranks, and give it back to transformers.

    python examples/finetune_transformers.py [DIRECTORY OF A HUGGING FACE MODEL]

Without a directory a tiny random model is made first. What to look for:

- colrow.from_pretrained reads just this rank's slices of the weights that transformers saved.
- The loop is torch's own: loss, backward, clip (by colrow, since parameters are divided), step.
- colrow.full_state_dict brings the whole weights together under transformers' names, and the loss
  that transformers computes with them is the one that training ended with.
"""

import sys
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import colrow
from colrow.launch import launch

STEPS, TOLERANCE = 10, 1e-5
# Any text will do: here every byte of the model's own documentation, folded into its vocabulary.
TEXT = torch.tensor([list(__doc__.encode()[:256])]).view(4, 64)


def finetune(directory: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss before and after on this rank, and on rank 0 the whole weights."""
    mesh = colrow.init_mesh(tp=2, device="cpu")
    model = colrow.from_pretrained(directory, mesh, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.loss(TEXT, TEXT).item()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(TEXT, TEXT)
        loss.backward()
        norm = colrow.clip_grad_norm_(model, 1.0)
        optimizer.step()
        if mesh.tp.rank == 0:
            print(f"step {step}  loss {loss.item():.4f}  |grad| {norm.item():.2f}")
    with torch.no_grad():
        after = model.eval().loss(TEXT, TEXT).item()
    return before, after, colrow.full_state_dict(model)


def tiny_model(directory: str) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=257,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=101,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def main(directory: str) -> int:
    before, after, weights = launch(finetune, (directory,), ranks=2)[0]
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    reference.load_state_dict(weights, strict=False)
    with torch.no_grad():
        theirs = reference(input_ids=TEXT, labels=TEXT).loss.item()
    print(f"loss {before:.4f} before, {after:.4f} after, {theirs:.4f} in transformers")
    return 0 if after < before and abs(theirs / after - 1) < TOLERANCE else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(sys.argv[1]))
    with tempfile.TemporaryDirectory() as place:
        tiny_model(place)
        code = main(place)
    sys.exit(code)
