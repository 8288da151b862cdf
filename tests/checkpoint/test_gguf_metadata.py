"""GGUF metadata: what llama.cpp reads of it and what changes an answer, key by key."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import colrow
from colrow.checkpoint.export_gguf import write_gguf
from colrow.checkpoint.pretrained import pretrained_config
from colrow.cli import main
from colrow.generation.tokenizer import end_tokens, load_tokenizer
from colrow.models.compose import fields_of
from colrow.train.starting_model import copy_model_files
from tests.checkpoint.test_loading import SIZES, write

F32 = gguf.GGMLQuantizationType.F32
TEXTS = [f"<{index}>" for index in range(SIZES["vocab_size"])]


def file(path: Path, family: str = "llama", **fields: Any) -> Path:
    """A small GGUF file with more fields; ``rope__scale_linear`` is the architecture's."""
    named = {}
    for key, value in fields.items():
        space = "" if key.startswith(("tokenizer", "general")) else f"{family}."
        named[space + key.replace("__", ".")] = value
    write(path / "model.gguf", family, SIZES, F32, named)
    return path / "model.gguf"


def texts(**at: str) -> list[str]:
    """A vocabulary with some texts: ``t7="<|im_end|>"``."""
    found = list(TEXTS)
    for place, text in at.items():
        found[int(place[1:])] = text
    return found


@pytest.mark.parametrize(
    ("named", "at", "configured", "more"),
    [
        ({}, {}, (), ()),
        ({"eos": 5}, {}, (5,), ()),
        ({"eos": 5, "eot": 7, "eom": 9}, {}, (5, 7, 9), ()),
        ({"eos": 5}, {"t8": "<|im_end|>", "t3": "<|endoftext|>"}, (5,), (3, 8)),
        ({"eos": 5}, {"t8": "<|eot_id|>", "t9": "<|eom_id|>"}, (5,), (8, 9)),
        ({"eos": 5}, {"t8": "<end_of_turn>", "t9": "</s>"}, (5,), (8, 9)),
        ({"eos": 5}, {"t8": "<|end|>"}, (5,), (8,)),
        ({"eos": 5}, {"t8": "<|end|>", "t9": "<|return|>", "t4": "<|call|>"}, (5,), (4, 9)),
        ({"eos": 5}, {"t8": "</s>", "t9": "<|tool_response>"}, (5,), (9,)),
        ({"eos": 5}, {"t8": "<|file_sep|>", "t9": "<|repo_name|>"}, (5,), (9, 8)),
        ({"eos": 5, "fim_pad": 6}, {"t8": "<|fim_pad|>"}, (5,), (6,)),
    ],
)
def test_every_token_that_ends_an_answer(
    tmp_path: Path,
    named: dict[str, int],
    at: dict[str, str],
    configured: tuple[int, ...],
    more: tuple[int, ...],
) -> None:
    ids: dict[str, Any] = {f"tokenizer__ggml__{n}_token_id": t for n, t in named.items()}
    path = file(tmp_path, tokenizer__ggml__tokens=texts(**at), **ids)
    assert pretrained_config(path).eos_token_ids == configured
    assert end_tokens(path, configured) == configured + more


def test_a_sentencepiece_vocabulary_ends_with_its_second_token(tmp_path: Path) -> None:
    path = file(tmp_path, tokenizer__ggml__model="llama")
    assert pretrained_config(path).eos_token_ids == (2,)
    assert pretrained_config(path).bos_token_id == 1


def test_a_real_model_ends_at_an_end_of_turn_that_no_key_names(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.gguf"
    shutil.copyfile(smollm2, path)
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields["tokenizer.ggml.eos_token_id"]
    field.parts[field.data[0]][0] = 0  # <|endoftext|>
    reader.data.flush()
    ends = end_tokens(path, pretrained_config(path).eos_token_ids)
    assert ends == (0, 4, 2)  # <reponame>, by which code models end a file, and <|im_end|>
    prompt = ["generate", str(path), "Say hi.", "--max-new-tokens", "60", "--json", "-"]
    assert main(prompt) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] == "stop" and result["token_ids"][-1] == 2
    (tmp_path / "files").mkdir()
    copy_model_files(path, tmp_path / "files")  # what an export is made of ends there too
    assert 2 in end_tokens(tmp_path / "files", ())


def test_end_tokens_of_a_directorys_tokenizer(tmp_path: Path) -> None:
    class Ends:
        eos_token_id = 9

    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert end_tokens(tmp_path, (2,), Ends()) == (2, 5, 9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "scaling", "factor"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, "linear", 4.0),
        ({"rope__scaling__factor": 4.0}, "linear", 4.0),  # linear where no type is given
        ({"rope__scale_linear": 4.0}, "linear", 4.0),  # what older files call it
        ({"rope__scale_linear": 4.0, "rope__scaling__factor": 2.0}, "linear", 2.0),
        ({"rope__scaling__factor": 0.0}, "default", 1.0),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, "default", 1.0),
    ],
)
def test_rotary_scaling(
    tmp_path: Path, fields: dict[str, Any], scaling: str, factor: float
) -> None:
    rope = fields_of(pretrained_config(file(tmp_path, **fields)))["rope"]
    assert rope is not None and (rope.scaling, rope.factor) == (scaling, factor)


def test_yarn_is_what_llama_cpp_makes_of_it(tmp_path: Path) -> None:
    """Its magnitude grows with the factor, and a further one multiplies it."""
    fields = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 16,
        "rope__scaling__attn_factor": 2.0,
    }
    rope = fields_of(pretrained_config(file(tmp_path, **fields)))["rope"]
    grown = 2 * (1 + 0.1 * math.log(4.0))
    assert rope == replace(
        rope, scaling="yarn", factor=4.0, original_max_positions=16, attention_factor=grown
    )


NEUTRAL: dict[str, Any] = {
    "attention__causal": True,
    "attention__scale": 16**-0.5,
    "expert_count": 0,
    "logit_scale": 1.0,
    "rope__scaling__attn_factor": 1.0,
    "rope__scaling__original_context_length": 64,
    "tensor_data_layout": "Meta AI original pth",
    "feed_forward_length": [96, 96],
    "attention__head_count_kv": [2, 2],
    "general__sampling__temp": 0.7,
    "general__some_note": "x",
}


def test_what_changes_nothing_is_accepted(tmp_path: Path) -> None:
    plain = pretrained_config(file(tmp_path))
    assert pretrained_config(file(tmp_path, **NEUTRAL)) == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention__causal": False}, r"llama\.attention\.causal=False, which is not supported"),
        ({"attention__scale": 0.5}, r"attention\.scale=0\.5"),
        ({"attention__clamp_kqv": 8.0}, r"clamp_kqv=8\.0"),
        ({"attention__sliding_window_pattern": [True, False]}, "sliding_window_pattern"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"residual_scale": 0.5}, "residual_scale"),
        ({"embedding_scale": 12.0}, "embedding_scale"),
        ({"expert_count": 8}, "expert_count"),
        ({"expert_weights_scale": 2.0}, "expert_weights_scale"),
        ({"use_parallel_residual": True}, "use_parallel_residual"),
        ({"pooling_type": 3}, "pooling_type"),
        ({"some_key_of_tomorrow": 1}, r"llama\.some_key_of_tomorrow=1, which is not supported"),
        ({"rope__freq_base_swa": 5.0}, "freq_base_swa"),
        ({"rope__scaling__type": "ntk"}, "rope scaling 'ntk' is not supported"),
        ({"rope__scaling__type": "longrope"}, "without tensors of factors"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__yarn_ext_factor": 0.0},
            "yarn_ext_factor=0",
        ),
        ({"rope__dimension_count": 8}, r"rope\.dimension_count=8, but the size of a head is 16"),
        ({"attention__value_length": 8}, "value_length=8, but the length of keys is 16"),
        ({"vocab_size": 96}, "vocab_size=96, but the number of rows"),
        ({"feed_forward_length": [96, 48]}, r"\[96, 48\]: layers that differ"),
        ({"tokenizer__ggml__tokens": TEXTS[:-1]}, "96 tokens in tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__eot_token_id": 97}, "eot_token_id=97, which is no token of its 97"),
        ({"general__type": "adapter"}, "general.type 'adapter': it is not a model"),
        ({"block_count": 1}, "beyond what a llama model"),
    ],
)
def test_what_changes_numbers_and_is_not_known_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        colrow.from_pretrained(file(tmp_path, **fields))


def test_biases_that_a_llama_file_may_have(tmp_path: Path) -> None:
    biased = {**SIZES, "attention_bias": True, "mlp_bias": True}
    model = write(tmp_path / "biased.gguf", "llama", biased, F32)
    ids = torch.arange(12)[None]
    loaded = colrow.from_pretrained(tmp_path / "biased.gguf")
    fields = fields_of(loaded.config)
    assert fields["qkv_bias"] and fields["output_bias"] and fields["mlp_bias"]
    assert torch.equal(loaded(ids), model.eval()(ids))


def test_a_file_that_is_written_says_what_is_in_it(tmp_path: Path) -> None:
    like = file(tmp_path, rope__scaling__factor=4.0)
    model = colrow.from_pretrained(like)
    write_gguf(model, tmp_path / "again.gguf", like, torch.float32)
    assert pretrained_config(tmp_path / "again.gguf") == model.config
    ids = torch.arange(12)[None]
    assert torch.equal(colrow.from_pretrained(tmp_path / "again.gguf")(ids), model(ids))
    other = colrow.from_config({"model_type": "llama", **SIZES})
    with pytest.raises(ValueError, match="is a model with rope="):
        write_gguf(other, tmp_path / "third.gguf", like, torch.float32)


def test_numbers_are_cut_as_the_files_tokenizer_was_trained(smollm2: Path) -> None:
    """Digit by digit, as SmolLM2's own tokenizer.json says and llama.cpp does."""
    tokenizer: Any = load_tokenizer(smollm2)
    assert tokenizer.tokenize("in 2024,") == ["in", "Ġ", "2", "0", "2", "4", ","]


BYTES = ["Ġ", "a", "b", "1", "2", "Ġa", "ab", "12", "<s>"]


def small_tokenizer(path: Path, **fields: Any) -> Any:
    tokens = BYTES + TEXTS[len(BYTES) :]
    options = {
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": [1] * 8 + [3] + [1] * (len(tokens) - 9),
        "tokenizer__ggml__merges": ["Ġ a", "1 2"],
        "tokenizer__ggml__bos_token_id": 8,
        **fields,
    }
    return load_tokenizer(file(path, **options))


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", [5, 2, 7]),
        ("smollm", [5, 2, 3, 4]),
        ("llama-bpe", [8, 5, 2, 7]),  # begins with <s> where no key says otherwise
        ("qwen2", [5, 2, 3, 4]),
        (None, [5, 2, 7]),
    ],
)
def test_kinds_of_words(tmp_path: Path, pre: str | None, tokens: list[int]) -> None:
    tokenizer = small_tokenizer(tmp_path, tokenizer__ggml__pre=pre)
    assert tokenizer(" ab12").input_ids == tokens


def test_llama3_takes_whole_words_of_its_vocabulary(tmp_path: Path) -> None:
    """Also words that its merges do not lead to, as llama.cpp and its tokenizer.json do."""
    assert small_tokenizer(tmp_path, tokenizer__ggml__pre="llama-bpe")("ab").input_ids == [8, 6]
    assert small_tokenizer(tmp_path, tokenizer__ggml__pre="gpt-2")("ab").input_ids == [1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tokenizer__ggml__pre": "deepseek-llm"},
            "pre='deepseek-llm' is not supported: codeshell",
        ),
        ({"tokenizer__ggml__model": "rwkv"}, "model='rwkv' is not supported"),
        ({"tokenizer__ggml__add_eos_token": True}, "add_eos_token is set"),
    ],
)
def test_unknown_tokenizers_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small_tokenizer(tmp_path, **fields)


@pytest.mark.parametrize(("space", "tokens"), [(None, ["▁a"]), (True, ["▁a"]), (False, ["a"])])
def test_sentencepiece_with_and_without_a_space_in_front(
    tmp_path: Path, space: bool | None, tokens: list[str]
) -> None:
    vocabulary = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
    tokenizer = small_tokenizer(
        tmp_path,
        tokenizer__ggml__model="llama",
        tokenizer__ggml__tokens=vocabulary + TEXTS[6:],
        tokenizer__ggml__scores=[0.0] * len(TEXTS),
        tokenizer__ggml__token_type=[2, 3, 3] + [1] * (len(TEXTS) - 3),
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__merges=["▁ a"],
        tokenizer__ggml__add_space_prefix=space,
    )
    assert tokenizer.tokenize("a") == tokens
    assert tokenizer.decode(tokenizer("a").input_ids, skip_special_tokens=True) == "a"
