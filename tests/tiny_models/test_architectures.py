"""Tiny models are tiny, awkward, whole in kind, and the same at every call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from colrow.tiny_models.architectures import Architecture, architectures, build, saved_architecture
from colrow.tiny_models.example_batch import batch, prompt
from colrow.verification.model_run import run


def test_every_causal_language_model_is_listed() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = [a.name for a in architectures()]
    assert len(names) == len(set(names))
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) < set(names)
    assert {"t5 (encoder-decoder)", "clip (two towers)", "vit (classifier)"} < set(names)


def test_names_choose_and_unknown_ones_are_refused() -> None:
    assert [a.task for a in architectures(["bert"])] == ["causal LM", "masked LM"]
    assert [a.task for a in architectures(["bert (masked LM)"])] == ["masked LM"]
    with pytest.raises(ValueError, match="no architecture lama"):
        architectures(["llama", "lama"])


def test_sizes_are_awkward_or_even() -> None:
    config = build(Architecture("llama")).config
    assert (config.num_attention_heads, config.vocab_size) == (6, 97)
    assert config.num_key_value_heads in (2, 3)
    assert config.intermediate_size % 2 == 1
    config = build(Architecture("llama", even=True)).config
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    assert all(size % 6 == 0 for size in (*sizes, config.vocab_size))


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text", "deepseek_v4", "nemotron_h"])
def test_every_kind_of_layer_occurs_once_at_least(name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tiny, default = build(Architecture(name)).config, CONFIG_MAPPING[name]()
    assert set(tiny.layer_types) == set(default.layer_types)
    assert len(tiny.layer_types) == tiny.num_hidden_layers <= 8


def test_every_parameter_is_random_and_the_same_again() -> None:
    one = dict(build(Architecture("gpt2")).named_parameters())
    torch.manual_seed(5)
    two = dict(build(Architecture("gpt2")).named_parameters())
    for name, parameter in one.items():
        assert parameter.dtype == torch.float64
        assert torch.equal(parameter, two[name])
        assert parameter.std() > 0, name


@pytest.mark.parametrize("name", ["mixtral", "mamba2", "whisper", "clip", "deberta-v2"])
def test_each_kind_of_model_computes_its_loss(name: str) -> None:
    architecture = architectures([name])[-1]
    model = build(architecture)
    result = run(architecture, model)
    assert result.outputs and torch.isfinite(result.loss)
    assert (result.tokens is None) == (prompt(architecture, model) is None)
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert "labels" in batch(architecture, model) or architecture.task == "two towers"


def test_a_saved_model_is_recognised_by_its_directory(tmp_path: Path) -> None:
    architecture = Architecture("bert", "AutoModelForMaskedLM")
    model = build(architecture)
    model.save_pretrained(tmp_path)
    saved = saved_architecture(tmp_path)
    assert saved == Architecture("bert", "AutoModelForMaskedLM", directory=str(tmp_path))
    again = build(saved)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    with pytest.raises(ValueError, match=r"no config\.json"):
        saved_architecture(tmp_path / "nowhere")


@pytest.mark.slow
def test_all_but_a_few_run_whole() -> None:
    problems = {}
    for architecture in architectures():
        try:
            run(architecture, build(architecture), generates=False)
        except Exception as error:
            problems[architecture.name] = str(error)
    # Two draft heads of other models, and one that needs a library for images.
    assert set(problems) <= {"gemma4_assistant", "gemma4_unified_assistant", "gemma3n"}, problems
