"""LoRA adapters of PEFT on a model that is split in place, against the unsplit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import colrow
from colrow.mesh import Mesh, ParallelGroup
from colrow.zoo.architectures import Architecture, build
from colrow.zoo.inputs import batch
from colrow.zoo.measure import full_precision
from tests.ranks import RankPool

peft = pytest.importorskip("peft")

LLAMA, STEPS = Architecture("llama"), 3
# Column-parallel and row-parallel layers, in attention and in the MLP.
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def with_adapters() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(LLAMA), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B starts at 0, which would hide half of what can go wrong
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values * 0.1
    return model


def train(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with full_precision():
            loss = model(**batch(LLAMA, model)).loss
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def split_and_train(tp: ParallelGroup, directory: Path) -> tuple[list[float], dict[str, Tensor]]:
    single = ParallelGroup.single
    mesh = Mesh(tp, single("dp"), single("pp"), None, torch.get_default_device())
    model = colrow.parallelize(with_adapters(), mesh)
    losses = train(model)
    weights = colrow.full_state_dict(model)
    if tp.rank == 0:
        adapter = peft.get_peft_model_state_dict(model, state_dict=weights)
        from safetensors.torch import save_file

        model.peft_config["default"].save_pretrained(directory)
        tensors = {name: value.contiguous() for name, value in adapter.items()}
        save_file(tensors, directory / "adapter_model.safetensors")
    return losses, weights


def test_adapters_train_to_those_of_the_unsplit_model_and_load_into_it(
    ranks: RankPool, tmp_path: Path
) -> None:
    whole = with_adapters()
    expected = train(whole)
    losses, weights = ranks(2, split_and_train, tmp_path)[0]
    assert losses == pytest.approx(expected, rel=1e-10)
    trained = {n: p.detach() for n, p in whole.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(TARGETS)
    for name, parameter in trained.items():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-8, atol=1e-10)
    loaded = peft.PeftModel.from_pretrained(build(LLAMA), tmp_path)
    with torch.no_grad(), full_precision():
        again = loaded(**batch(LLAMA, loaded)).loss
        after = whole(**batch(LLAMA, whole)).loss
    assert again.item() == pytest.approx(after.item(), rel=1e-10)


def adapters_too_late(tp: ParallelGroup) -> str:
    single = ParallelGroup.single
    mesh = Mesh(tp, single("dp"), single("pp"), None, torch.get_default_device())
    model: Any = colrow.parallelize(build(LLAMA), mesh)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=TARGETS))
    with pytest.raises(ValueError, match="before the split") as caught:
        colrow.clip_grad_norm_(model, 1.0)
    return str(caught.value)


def test_adapters_that_come_after_the_split_are_refused_when_clipping(ranks: RankPool) -> None:
    for message in ranks(2, adapters_too_late):
        assert "LoRA adapters" in message
