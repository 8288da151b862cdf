"""transformers' Trainer with a tensor-parallel model: one class in place of another.

    python examples/trainer_transformers.py

What to look for:

- colrow.init_mesh joins the ranks, and TensorParallelTrainer splits the model. The rest of the
  script is what it would be on one device: arguments, data, callbacks, `trainer.train()`.
- The ranks see the same batches, one of them logs, and the norm in the log, by which gradients are
  clipped, is that of the whole model.
- The losses and the weights are those of the Trainer with the whole model on one rank.
"""

import sys
import tempfile

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import colrow
from colrow.launch import launch, launched_by
from colrow.transformers import TensorParallelTrainer

RANKS, STEPS, TOLERANCE = 2, 6, 1e-4
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 101,
}


def train(tp: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The log, and the whole weights on rank 0."""
    mesh = colrow.init_mesh(tp=tp, device="cpu")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    ids = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=4,
            max_steps=STEPS,
            learning_rate=1e-3,
            logging_steps=1,
            max_grad_norm=0.5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        if tp == 1:
            trainer = Trainer(model, arguments, train_dataset=data)
        else:
            trainer = TensorParallelTrainer(model, arguments, mesh=mesh, train_dataset=data)
        trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    return log, colrow.full_state_dict(model) if tp > 1 else model.state_dict()


def main() -> int:
    log, weights = launch(train, (RANKS,), ranks=RANKS)[0]
    expected, whole = train(1)
    worst = max((value - whole[name]).abs().max().item() for name, value in weights.items())
    for ours, theirs in zip(log, expected, strict=True):
        print(f"step {ours['step']}  loss {ours['loss']:.4f}  whole {theirs['loss']:.4f}")
        worst = max(worst, *(abs(ours[name] - theirs[name]) for name in ("loss", "grad_norm")))
    print(f"largest difference of a loss, a norm or a weight: {worst:.1e}")
    print("The Trainer saw no difference." if worst < TOLERANCE else "They differ.")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    # Under torchrun this process is a rank already; otherwise the ranks are started here.
    sys.exit(train(RANKS) is None if launched_by() else main())
