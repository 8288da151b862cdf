"""The Trainer of transformers on ranks that hold one model, against it with the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.launch import launch
from colrow.transformers import TensorParallelTrainer
from colrow.verification.reference import full_precision, quiet_transformers
from tests.train.layouts import Layout

pytestmark = [
    pytest.mark.cpu_only("transformers' Trainer on the CPU, in fp64"),
    pytest.mark.slow,
    pytest.mark.new_interpreters,
]

STEPS, CLIP, ROWS = 4, 0.5, 2  # rows of a microbatch
Log = list[tuple[float, float]]


def make_model() -> Any:
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "llama",
            vocab_size=97,
            hidden_size=20,
            num_hidden_layers=2,
            num_attention_heads=5,
            num_key_value_heads=1,
            intermediate_size=33,
        )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double()


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(
        r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def rows() -> list[dict[str, Tensor]]:
    """Rows of which different numbers of tokens count."""
    ids = torch.randint(3, 97, (24, 9), generator=torch.Generator().manual_seed(1))
    labels = [row.masked_fill(torch.arange(9) < index % 5, -100) for index, row in enumerate(ids)]
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def arguments(output: Path, **options: Any) -> Any:
    with quiet_transformers():
        from transformers import TrainingArguments

        return TrainingArguments(
            str(output),
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            learning_rate=1e-2,
            logging_steps=1,
            max_grad_norm=CLIP,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            eval_strategy="steps",
            eval_steps=STEPS,
            **options,
        )


def numbers(trainer: Any) -> Log:
    log = trainer.state.log_history
    found = [(line["loss"], line["grad_norm"]) for line in log if "loss" in line]
    return [*found, (next(line["eval_loss"] for line in log if "eval_loss" in line), 0.0)]


def whole(output: Path, adapters: bool) -> tuple[Log, dict[str, Tensor]]:
    """Two microbatches of each step, as two dp ranks have them."""
    with quiet_transformers():
        from transformers import Trainer
    model = with_adapters(make_model()) if adapters else make_model()
    options = arguments(output, gradient_accumulation_steps=2)
    data = rows()
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data[:6])
    with full_precision():
        trainer.train()
    return numbers(trainer), {name: p.detach() for name, p in model.named_parameters()}


def numbers_agree(logs: list[Log]) -> bool:
    """The same whether in one go or continued."""
    return all(log == logs[0] for log in logs)


def on_ranks(layout: Layout, output: Path, adapters: bool) -> tuple[Log, dict[str, Tensor], bool]:
    """Trains twice: in one go, and from the checkpoint of its second step."""
    torch.set_num_threads(1)
    mesh = colrow.init_mesh(tp=layout.tp, dp=layout.dp, device="cpu", engine="gloo")
    data, logs, states = rows(), [], list[dict[str, Tensor]]()
    accumulated = 2 // layout.dp
    checkpoint = str(output / "checkpoint-2")
    for resume in (None, checkpoint) if layout.dp == 1 else (None,):
        model: nn.Module = with_adapters(make_model()) if adapters else make_model()
        trainer = TensorParallelTrainer(
            model,
            arguments(output, gradient_accumulation_steps=accumulated),
            mesh=mesh,
            train_dataset=data,
            eval_dataset=data[:6],
        )
        with full_precision():
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.is_world_process_zero() == (mesh.world.rank == 0)
        logs.append(numbers(trainer))
        states.append(colrow.full_state_dict(model))
    trainer.save_model(str(output / "saved"))
    if layout.dp > 1:
        with pytest.raises(ValueError, match="resume_from_checkpoint with dp=2 is not possible"):
            trainer.train(resume_from_checkpoint=checkpoint)
    same = all(torch.equal(states[-1][n], v) for n, v in states[0].items())
    same &= numbers_agree(logs)
    return logs[0], states[0], same


@pytest.mark.parametrize(
    ("layout", "adapters"),
    [(Layout(tp=2, dp=2), False), (Layout(tp=2), True)],
    ids=["tp2-dp2", "tp2-lora"],
)
def test_losses_norms_and_weights_are_those_of_the_whole_model(
    tmp_path: Path, layout: Layout, adapters: bool
) -> None:
    log, weights = whole(tmp_path / "whole", adapters)
    given = (layout, tmp_path / "split", adapters)
    found = launch(on_ranks, given, ranks=layout.ranks, timeout_seconds=200)
    assert all(same for _, _, same in found)
    ours, state, _ = found[0]
    for (loss, norm), (expected, expected_norm) in zip(ours, log, strict=True):
        assert (loss, norm) == pytest.approx((expected, expected_norm), rel=1e-10)
    for name, value in weights.items():
        if name in state:
            assert torch.allclose(state[name], value, rtol=1e-9, atol=1e-12), name
    saved = tmp_path / "split" / "saved"
    assert (saved / ("adapter_model.safetensors" if adapters else "model.safetensors")).exists()
    with quiet_transformers():
        if adapters:
            from peft import PeftModel

            again: Any = PeftModel.from_pretrained(make_model(), saved)
        else:
            from transformers import AutoModelForCausalLM

            again = AutoModelForCausalLM.from_pretrained(saved)
    for name, value in again.named_parameters():
        assert torch.allclose(value, weights[name], rtol=1e-9, atol=1e-12), name
    states = [json.loads(f.read_text()) for f in tmp_path.glob("split/*/trainer_state.json")]
    assert {state["global_step"] for state in states} == {2, 4}


def refusal(output: Path) -> list[str]:
    mesh, said = colrow.init_mesh(tp=2, device="cpu", engine="gloo"), list[str]()
    attempts: list[Callable[[], object]] = [
        lambda: TensorParallelTrainer(make_model(), arguments(output, fp16=True), mesh=mesh),
        lambda: TensorParallelTrainer(None, arguments(output), mesh=mesh, model_init=make_model),
    ]
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_is_not_possible_is_said(tmp_path: Path) -> None:
    said = launch(refusal, (tmp_path,), ranks=2, timeout_seconds=100)
    assert said[0] == said[1] and len(said[0]) == 2
    assert said[0][0] == "fp16 is not possible with a model that is split: use bf16"
    assert said[0][1].startswith("give a model that has been made")
