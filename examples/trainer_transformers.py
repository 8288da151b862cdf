"""transformers' Trainer with a tensor-parallel model: three changes to an ordinary script.

    python examples/trainer_transformers.py

What to look for:

- colrow.parallelize splits the model, once colrow.init_mesh has joined the ranks.
- The Trainer takes ranks for data parallelism: it would give each other rows and average their
  gradients. These ranks hold one model between them, so it must not see the launcher's variables:
  each rank's Trainer then works alone, on the same batches, since the seed is the same.
- The Trainer would clip by the norm of what one rank holds: colrow.clip_grad_norm_ knows the norm
  of the whole gradient, so clipping moves into a callback.
- The losses and the weights are those of the Trainer with the whole model on one rank.
"""

import os
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import colrow
from colrow.launch import launch

RANKS, STEPS, CLIP, TOLERANCE = 2, 6, 0.5, 1e-4


class ClipWholeGradient(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        colrow.clip_grad_norm_(model, CLIP)


def make_model() -> torch.nn.Module:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=101,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def train(model: torch.nn.Module, tp: int) -> list[float]:
    ids = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=4,
            max_steps=STEPS,
            learning_rate=1e-3,
            logging_steps=1,
            max_grad_norm=CLIP if tp == 1 else 0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callbacks = [ClipWholeGradient()] if tp > 1 else []
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def on_a_rank() -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and the whole weights on rank 0."""
    mesh = colrow.init_mesh(tp=RANKS, device="cpu")
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    model = colrow.parallelize(make_model(), mesh)
    return train(model, RANKS), colrow.full_state_dict(model)


def main() -> int:
    whole = make_model()
    expected = train(whole, 1)
    losses, weights = launch(on_a_rank, ranks=RANKS)[0]
    for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        print(f"step {step}  loss {ours:.4f}  whole {theirs:.4f}")
    worst = max(
        (weights[name] - parameter.detach()).abs().max().item()
        for name, parameter in whole.named_parameters()
    )
    worst = max(worst, *(abs(a - b) for a, b in zip(losses, expected, strict=True)))
    print(f"largest difference of a loss or a weight: {worst:.1e}")
    print("The Trainer saw no difference." if worst < TOLERANCE else "They differ.")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
