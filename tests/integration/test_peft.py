"""LoRA adapters of PEFT on a model that is split in place, against the unsplit model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call, Ledger, record
from colrow.tiny_models.architectures import Architecture, build
from colrow.tiny_models.example_batch import batch
from colrow.verification.reference import full_precision
from tests.inplace.test_parallelize import mesh_of
from tests.ranks import RankPool

peft = pytest.importorskip("peft")

LLAMA, GPT2, STEPS = Architecture("llama"), Architecture("gpt2"), 3
ALL = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONV1D = {**ALL, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}


@dataclass(frozen=True)
class Case:
    """A model, its adapters, and how many collectives a step may take (None: not counted)."""

    architecture: Architecture
    config: dict[str, Any]
    collectives: int | None = None
    more: tuple[dict[str, Any], ...] = field(default=())
    tied: bool = False


CASES = {
    # As many as the model has without adapters.
    "every layer": Case(LLAMA, ALL, 11),
    "columns": Case(LLAMA, {**ALL, "target_modules": ["q_proj", "v_proj"]}, 11),
    "rows": Case(LLAMA, {**ALL, "target_modules": ["o_proj", "down_proj"]}, 10),
    "embedding and head": Case(LLAMA, {**ALL, "target_modules": ["embed_tokens", "lm_head"]}),
    "two at once": Case(LLAMA, ALL, 11, ({**ALL, "r": 2, "use_rslora": True},)),
    "GPT-2's layers, biases": Case(GPT2, {**CONV1D, "bias": "all", "lora_bias": True}, 11),
    # And one number for each output feature of each row-parallel layer.
    "DoRA": Case(LLAMA, {**ALL, "use_dora": True}, 15),
    "a tied embedding": Case(LLAMA, {**ALL, "modules_to_save": ["embed_tokens"]}, tied=True),
    "a tied, scaled one": Case(
        Architecture("gemma2"), {**ALL, "modules_to_save": ["embed_tokens"]}
    ),
    "IA3": Case(LLAMA, {}),
}


def with_adapters(case: Case) -> Any:
    torch.manual_seed(0)
    model: Any = build(case.architecture)
    if case.tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    config = peft.LoraConfig(**case.config) if case.config else peft.IA3Config("CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for number, more in enumerate(case.more):
        model.add_adapter(f"more{number}", peft.LoraConfig(**more))
    if case.more:
        model.base_model.set_adapter(["default", *(f"more{i}" for i in range(len(case.more)))])
    randomise(model, ".default." if not case.more else "")
    return model


def randomise(model: nn.Module, among: str) -> None:
    """Gives adapters other values: B starts at 0, which would hide half of what can go wrong."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and among in f"{name}." and "magnitude" not in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = values * 0.1


def train(model: Any, case: Case) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, first = [], None
    for _ in range(STEPS):
        optimizer.zero_grad()
        with full_precision():
            loss = model(**batch(case.architecture, model)).loss
            loss.backward()
        if first is None:
            first = grads_of(model)
        optimizer.step()
        losses.append(loss.item())
    assert first is not None
    return losses, first


def grads_of(model: Any) -> dict[str, Tensor]:
    if "colrow_record" in model.__dict__:
        return colrow.full_grads(model)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits_of(model: Any, case: Case) -> Tensor:
    inputs = {k: v for k, v in batch(case.architecture, model).items() if k != "labels"}
    with full_precision():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


@dataclass
class Run:
    losses: list[float]
    grads: dict[str, Tensor]
    logits: Tensor
    without: Tensor
    collectives: int = 0


def ran(model: Any, case: Case) -> Run:
    losses, grads = train(model.train(), case)
    logits = logits_of(model, case)
    with model.disable_adapter():
        without = logits_of(model, case)
    return Run(losses, grads, logits, without)


def of_layers(ledger: Ledger) -> list[Call]:
    """Without the comparison of the ranks' inputs."""
    return [call for call in ledger.calls if call.layer != "inputs"]


def split_and_run(tp: ParallelGroup, names: list[str]) -> dict[str, Run]:
    found = {}
    for name in names:
        case = CASES[name]
        model: Any = colrow.parallelize(with_adapters(case), mesh_of(tp))
        with record(tp) as ledger, full_precision():
            model(**batch(case.architecture, model)).loss.backward()
        model.zero_grad()
        found[name] = ran(model, case)
        found[name].collectives = len(of_layers(ledger))
        colrow.clip_grad_norm_(model, 1.0)
    return found


@pytest.mark.parametrize(
    ("tp", "names"),
    [(2, list(CASES)), (3, ["every layer", "GPT-2's layers, biases", "DoRA", "a tied embedding"])],
)
def test_adapters_train_as_those_of_the_unsplit_model(
    ranks: RankPool, tp: int, names: list[str]
) -> None:
    results = ranks(tp, split_and_run, names)
    for name in names:
        case, got = CASES[name], results[0][name]
        expected = ran(with_adapters(case), case)
        assert got.losses == pytest.approx(expected.losses, rel=1e-10), name
        assert got.grads.keys() == expected.grads.keys()
        for parameter, grad in expected.grads.items():
            torch.testing.assert_close(got.grads[parameter], grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got.without, expected.without, rtol=1e-9, atol=1e-11)
        if case.collectives is not None:
            assert got.collectives == case.collectives, name


def lived(model: Any, directory: Path, tp: ParallelGroup | None) -> tuple[list[Tensor], list[str]]:
    """What may be done to adapters after the split; logits after each step, and refusals."""
    case, seen, refused = CASES["every layer"], [], []

    def look() -> None:
        seen.append(logits_of(model, case))

    model.merge_adapter()
    look()
    model.unmerge_adapter()
    look()
    torch.manual_seed(7)
    model.add_adapter("second", peft.LoraConfig(**{**ALL, "r": 2, "init_lora_weights": False}))
    model.set_adapter("second")
    look()
    seen += [torch.tensor(loss) for loss in train(model.train(), case)[0]]
    look()
    model.load_adapter(str(directory / "adapter"), "third", low_cpu_mem_usage=tp is None)
    model.set_adapter("third")
    look()
    model.delete_adapter("default")
    look()
    if tp is not None:
        spectral = peft.LoraConfig(**{**ALL, "init_lora_weights": "pissa"})
        for call in (
            lambda: model.add_adapter("fourth", spectral),
            lambda: model.save_pretrained(directory / "shards"),
            lambda: model.get_base_model().add_adapter(spectral),
            lambda: model(torch.tensor([[1]]), adapter_names=["third"]),
        ):
            with pytest.raises(ValueError, match="split") as caught:
                call()
            refused.append(str(caught.value))
        colrow.clip_grad_norm_(model, 1.0)
        colrow.save_pretrained(model, directory / "saved")
    merged = model.merge_and_unload()
    seen.append(logits_of(merged, case))
    if tp is not None:
        with full_precision():
            merged.requires_grad_(True)(**batch(case.architecture, merged)).logits.sum().backward()
        colrow.clip_grad_norm_(merged, 1.0)
        colrow.save_pretrained(torch.compile(merged), directory / "merged")
        with pytest.raises(ValueError, match=r"colrow\.save_pretrained"):
            merged.save_pretrained(directory / "shards")
    return seen, refused


def live_split(tp: ParallelGroup, directory: Path) -> tuple[list[Tensor], list[str]]:
    model = colrow.parallelize(with_adapters(CASES["every layer"]), mesh_of(tp))
    return lived(model, directory, tp)


def test_adapters_are_merged_added_loaded_and_saved_after_the_split(
    ranks: RankPool, tmp_path: Path
) -> None:
    import transformers

    case = CASES["every layer"]
    torch.manual_seed(3)
    other = peft.get_peft_model(build(LLAMA), peft.LoraConfig(**{**ALL, "r": 5}))
    randomise(other, "")
    other.save_pretrained(tmp_path / "adapter")
    expected, _ = lived(with_adapters(case), tmp_path, None)
    for seen, refused in ranks(2, live_split, tmp_path):
        for got, logits in zip(seen, expected, strict=True):
            torch.testing.assert_close(got, logits, rtol=1e-9, atol=1e-11)
        assert "add it before colrow.parallelize" in refused[0]
        assert "call colrow.save_pretrained(model, directory) on all ranks" in refused[1]
        assert "add adapters before the model is parallelised" in refused[2]
        assert "adapter_names" in refused[3] and "set_adapter" in refused[3]
    assert not (tmp_path / "shards").exists()
    loaded = peft.PeftModel.from_pretrained(build(LLAMA), tmp_path / "saved" / "third")
    torch.testing.assert_close(logits_of(loaded, case), expected[-2], rtol=1e-9, atol=1e-11)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float64
    torch.testing.assert_close(logits_of(merged, case), expected[-1], rtol=1e-9, atol=1e-11)


def dropped(tp: ParallelGroup) -> list[Tensor]:
    """Weights after steps with dropout in adapters and attention, and a number drawn then."""
    torch.manual_seed(2)
    model: Any = build(Architecture("gpt2"))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    config = peft.LoraConfig(**{**CONV1D, "lora_dropout": 0.2})
    model = colrow.parallelize(peft.get_peft_model(model, config), mesh_of(tp))
    torch.manual_seed(4)
    case = CASES["GPT-2's layers, biases"]
    losses, _ = train(model.train(), case)
    held = model.colrow_record.specs
    whole = [p.detach() for n, p in model.named_parameters() if n not in held]
    return [torch.tensor(losses), torch.rand(3), *whole]


def test_dropout_of_adapters_keeps_the_ranks_together(ranks: RankPool) -> None:
    first, *others = ranks(3, dropped)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def adapters_too_late(tp: ParallelGroup) -> list[str]:
    model: Any = colrow.parallelize(build(LLAMA), mesh_of(tp))
    model = peft.get_peft_model(model, peft.LoraConfig(**ALL))
    messages = []
    for call in (
        lambda: colrow.clip_grad_norm_(model, 1.0),
        lambda: colrow.save_pretrained(model, "/nowhere"),
        lambda: colrow.parallelize(
            with_adapters(CASES["rows"]), mesh_of(tp), sequence_parallel=True
        ),
    ):
        with pytest.raises(ValueError, match=r"LoRA adapters|colrow\.parallelize") as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_what_adapters_cannot_do_is_refused(ranks: RankPool) -> None:
    for clipping, saving, sequence in ranks(2, adapters_too_late):
        assert "LoRA adapters, are to be added before the split" in clipping
        assert "add them before colrow.parallelize" in saving
        assert "sequence_parallel=True does not go with LoRA adapters" in sequence


def test_adapters_share_the_collectives_of_their_layers(ranks: RankPool) -> None:
    calls: list[Any] = ranks(2, calls_of_a_step)[0]
    forward = Counter(call.layer.split(".")[-1] for call in calls if call.phase == "forward")
    assert forward == {"embed_tokens": 1, "o_proj": 2, "down_proj": 2, "lm_head": 1}


def calls_of_a_step(tp: ParallelGroup) -> list[Any]:
    model: Any = colrow.parallelize(with_adapters(CASES["every layer"]), mesh_of(tp))
    with record(tp) as ledger, full_precision():
        model(**batch(LLAMA, model)).loss.backward()
    return of_layers(ledger)
