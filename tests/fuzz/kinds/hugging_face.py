"""transformers' own models of any architecture, tiny and of random head counts, split in place."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import colrow
from colrow.tiny_models import sizes
from colrow.tiny_models.architectures import OTHERS, Architecture, build
from colrow.tiny_models.example_batch import batch
from colrow.verification.reference import full_precision, quiet_transformers
from tests.fuzz import compare
from tests.fuzz.case import Case, Fields, Kind, NotRunError, OneOf, World

_LIMIT = 1e-8
# What a user is most likely to have, and one of each unusual construction.
_MODELS = [
    *("llama", "gpt2", "bloom", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "mixtral"),
    *("qwen3_moe", "falcon", "mpt", "opt", "gptj", "codegen", "stablelm", "cohere", "starcoder2"),
    *("gpt_neox", "gpt_bigcode", "phi", "qwen2", "qwen3", "glm", "glm4", "nemotron", "persimmon"),
    *("deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "exaone4", "smollm3", "biogpt", "xglm"),
    *("mamba", "rwkv", "jamba", "bamba", "recurrent_gemma", "qwen3_next", "helium", "arcee"),
    *("bert-generation", "ctrl", "openai-gpt", "xlnet", "gpt_neo", "dbrx", "granitemoe"),
    *OTHERS,
]
# (query heads, KV heads where the model has such)
_HEADS = [[6, 2], [4, 4], [4, 2], [5, 1], [8, 2], [9, 3], [3, 3], [12, 4]]


def fields(ranks: int) -> Fields:
    return Fields(
        {
            "model": OneOf(_MODELS),
            "heads": OneOf([None, *_HEADS]),
            "ffn": OneOf([None, 24, 31]),
            "vocab": OneOf([None, 50, 128]),
            "tied": OneOf([None, True, False]),
            "sequence_parallel": OneOf([False, True]),
            "rows": OneOf([2, 1, 3]),
            "length": OneOf([9, 4, 1, 17]),
            "mask": OneOf([False, True]),
            "train": OneOf([False, True]),
            "generate": OneOf([False, True]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    architecture, model = _build(case)
    whole = _build(case)[1]
    every = [_inputs(architecture, model, case, number) for number in range(2)]
    try:
        expected = [_observed(whole, inputs, case) for inputs in every]
    except Exception as error:  # whatever transformers says to such sizes
        raise NotRunError(f"{case['model']}: {type(error).__name__}: {error}") from error
    if not all(bool(loss.isfinite()) for _, loss, _ in expected):
        raise NotRunError(f"{case['model']}: its loss is not finite")
    tokens = _generated(whole, every[0], case, architecture, may_fail=True)
    with quiet_transformers(), full_precision():
        colrow.parallelize(model, world.mesh(), sequence_parallel=case["sequence_parallel"])
    wrong: list[str] = []
    for number, (inputs, (outputs, loss, grads)) in enumerate(zip(every, expected, strict=True)):
        mine, my_loss, _ = _observed(model, inputs, case)
        wrong += compare.results(f"batch {number}: outputs", mine, outputs, _LIMIT)
        wrong += compare.difference(f"batch {number}: loss", my_loss, loss, _LIMIT)
        my_grads = colrow.full_grads(model)
        model.zero_grad(set_to_none=True)
        if world.rank == 0:
            what = f"batch {number}: gradient of"
            wrong += compare.gradients(what, my_grads, grads, _LIMIT)
    if tokens is not None:
        mine = _generated(model, every[0], case, architecture)
        if mine != tokens:
            wrong.append(f"greedy tokens are {mine}, not {tokens}")
    return wrong


def _generated(
    model: Any,
    inputs: dict[str, Any],
    case: Case,
    architecture: Architecture,
    *,
    may_fail: bool = False,
) -> list[list[int]] | None:
    """Greedy tokens with the model's own cache; None where they are not asked for."""
    if not case["generate"] or not architecture.is_causal_lm:
        return None
    given = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    model.eval()
    try:
        with quiet_transformers(), full_precision(), torch.no_grad():
            found: Tensor = model.generate(
                **given, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
            )
    except Exception:
        if may_fail:
            return None
        raise
    return found.tolist()


def _build(case: Case) -> tuple[Architecture, nn.Module]:
    name = case["model"]
    chosen: dict[str, Any] = {}
    if case["heads"]:
        heads, kv_heads = case["heads"]
        chosen |= dict.fromkeys(sizes.HEADS, heads) | dict.fromkeys(sizes.KV_HEADS, kv_heads)
        chosen |= dict.fromkeys(sizes.HIDDEN, heads * sizes.HEAD_DIM)
    if case["ffn"]:
        chosen |= {key: case["ffn"] for key in sizes.WIDTHS if "vocab" not in key}
    if case["vocab"]:
        chosen["vocab_size"] = case["vocab"]
    if case["tied"] is not None:
        chosen["tie_word_embeddings"] = case["tied"]
    known = _fields_of(name)
    kept = tuple((key, value) for key, value in chosen.items() if key in known)
    architecture = Architecture(name, OTHERS.get(name, "AutoModelForCausalLM"), fields=kept)
    try:
        return architecture, build(architecture)
    except Exception as error:
        raise NotRunError(f"{name}: {type(error).__name__}: {error}") from error


@cache
def _fields_of(name: str) -> frozenset[str]:
    """The fields of the configuration that hold a number or a choice."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet_transformers():
        try:
            values = vars(CONFIG_MAPPING[name]())
        except Exception:  # it has no default
            return frozenset()
    return frozenset(key for key, value in values.items() if isinstance(value, int))


def _inputs(
    architecture: Architecture, model: nn.Module, case: Case, number: int
) -> dict[str, Any]:
    inputs = batch(architecture, model)
    if not architecture.is_causal_lm or architecture.model_type in ("git", "musicgen"):
        for name, value in inputs.items():  # rows the other way round, images of other values
            if number and isinstance(value, Tensor):
                inputs[name] = value.flip(0) * (-2 if value.is_floating_point() else 1)
        return inputs
    rows, length = (case["rows"], case["length"]) if number == 0 else (2, 7)
    source = torch.Generator().manual_seed(number + 7)
    most = int(inputs["input_ids"].max())
    ids = torch.randint(3, max(4, most), (rows, length), generator=source)
    inputs |= {"input_ids": ids, "labels": ids}
    if case["mask"]:
        mask = torch.ones_like(ids)
        mask[-1, : length // 2] = 0
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return inputs


def _observed(
    model: nn.Module, inputs: dict[str, Any], case: Case
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Outputs, loss and this process's gradients; those stay in the parameters, too."""
    model.train(case["train"])
    model.zero_grad(set_to_none=True)
    with quiet_transformers(), full_precision():
        # With labels a split model gives its loss alone.
        result = model(**{key: value for key, value in inputs.items() if key != "labels"})
        if "labels" in inputs and inputs["labels"].shape[-1] > 1:
            loss = model(**inputs).loss
        else:  # one token has no next one
            loss = compare.flat(result)[0].square().mean()
        loss.backward()
    names = ("logits", "logits_per_image", "image_embeds", "text_embeds")
    found = [result[name] for name in names if isinstance(result.get(name), Tensor)]
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [y.detach() for y in found], loss.detach(), grads


HUGGING_FACE = Kind("hugging_face", fields, run, weight=1)
