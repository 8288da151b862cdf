from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colrow.generation.tokenizer import (
    TextStream,
    encode_prompt,
    end_tokens,
    load_tokenizer,
)
from tests.generation import models

TEXTS = [
    "plain words, and  two spaces\n\n",
    "你好，世界！",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 🏳️‍🌈",
    " leading space, é combined e\u0301, \u05e9\u05dc\u05d5\u05dd",
    "x",
]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token for each byte, as GPT-2 spells them."""
    directory = tmp_path_factory.mktemp("bytes")
    models.save_byte_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def fallback_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SentencePiece's way: spaces are part of tokens, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += list("abcdefghijklmnopqrstuvwxyz")
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_tokenizer", "fallback_tokenizer"])
def test_pieces_are_whole_characters_and_add_up(
    kind: str, text: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer(text).input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert stream.finish() == ""
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces), "a character waited for the next one"


def test_pieces_of_a_real_tokenizer(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    text = " ".join(TEXTS)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) + stream.finish() == text
    assert "�" not in "".join(pieces)


def test_special_tokens_are_left_out_and_keep_the_space_behind_them(
    fallback_tokenizer: Any,
) -> None:
    tokens = fallback_tokenizer("ab cd").input_ids
    middle = len(fallback_tokenizer("ab").input_ids)
    stream = TextStream(fallback_tokenizer)
    marked = [1, *tokens[:middle], 2, *tokens[middle:], 2]
    assert "".join(map(stream.push, marked)) + stream.finish() == "ab cd"


def test_bytes_that_never_become_a_character_come_last(byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer("é€").input_ids
    stream = TextStream(byte_tokenizer)
    assert [stream.push(token) for token in tokens[:-1]] == ["", "é", "", ""]
    assert stream.finish() == "�"
    assert stream.finish() == ""


def test_a_prompt_becomes_a_message_where_there_is_a_template(byte_tokenizer: Any) -> None:
    def text(**options: Any) -> str:
        decoded: str = byte_tokenizer.decode(encode_prompt(byte_tokenizer, "Hi", **options))
        return decoded

    assert text() == "<user>Hi<assistant>"
    assert text(system="Be brief.") == "<system>Be brief.<user>Hi<assistant>"
    assert text(chat=False) == "Hi"
    with pytest.raises(ValueError, match="when the chat template is not used"):
        text(system="Be brief.", chat=False)
    with pytest.raises(ValueError, match="no jokes"):
        text(system="joke")
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(byte_tokenizer, " \n")


def test_without_a_template_there_is_no_system_message(fallback_tokenizer: Any) -> None:
    assert encode_prompt(fallback_tokenizer, "ab") == fallback_tokenizer("ab").input_ids
    with pytest.raises(ValueError, match="without a chat template"):
        encode_prompt(fallback_tokenizer, "ab", system="Be brief.")


def test_the_gguf_tokenizer_is_transformers_own(smollm2: Path) -> None:
    """But for digits, which transformers does not take apart for this kind of file."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = reference.backend_tokenizer.pre_tokenizer
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    ours: Any = load_tokenizer(smollm2)
    assert ours.backend_tokenizer.to_str() == reference.backend_tokenizer.to_str()
    assert ours.chat_template == reference.chat_template
    assert ours.special_tokens_map == reference.special_tokens_map


def test_no_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer could be read from") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert "copy the files of the tokenizer" in str(caught.value)


def test_end_tokens_of_both_configurations(tmp_path: Path) -> None:
    assert end_tokens(tmp_path, (2,)) == (2,)
    file = tmp_path / "generation_config.json"
    for value, expected in (([5, 2], (2, 5)), (7, (2, 7)), (None, (2,))):
        file.write_text(json.dumps({"eos_token_id": value}))
        assert end_tokens(tmp_path, (2,)) == expected
    file.write_text("[]")
    with pytest.raises(ValueError, match="is not a generation configuration"):
        end_tokens(tmp_path, (2,))


def changed(directory: Path, change: dict[str, Any]) -> Path:
    """A tokenizer of bytes with something else in its tokenizer.json."""
    models.save_byte_tokenizer(directory)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return directory


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "steps",
    [
        [replace({"String": "a"}, "a" * 31)] * 3,
        [replace({"Regex": "a|b"}, "a" * 20)] * 3,
        [replace({"Regex": ""}, "a" * 1500)],
        [{"type": "Prepend", "prepend": "a" * 20_000}],
        [{"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 40)]}] * 2,
    ],
    ids=lambda steps: json.dumps(steps)[:60],
)
def test_a_normaliser_does_not_fill_the_memory(steps: list[Any], tmp_path: Path) -> None:
    normalizer = {"type": "Sequence", "normalizers": steps}
    with pytest.raises(ValueError, match=r"the normalizer of .* can make a text .* times longer"):
        load_tokenizer(changed(tmp_path, {"normalizer": normalizer}))


def test_what_normalisers_do_in_earnest(tmp_path: Path, fallback_tokenizer: Any) -> None:
    fallback_tokenizer.save_pretrained(tmp_path / "fallback")
    load_tokenizer(tmp_path / "fallback")
    steps = [{"type": "NFKC"}, replace({"Regex": " {2,}"}, "▁"), replace({"String": "``"}, '"')]
    load_tokenizer(
        changed(tmp_path / "a", {"normalizer": {"type": "Sequence", "normalizers": steps}})
    )


def test_numbers_of_tokens(tmp_path: Path) -> None:
    """A tokenizer goes to the ranks with every number up to the largest."""
    models.save_byte_tokenizer(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"]["20001231 x"] = 9_999_999
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    load_tokenizer(tmp_path)
    values["model"]["vocab"]["20001231 x"] = 2**31 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="gives '20001231 x' the number 2147483647"):
        load_tokenizer(tmp_path)


def test_settings_of_a_tokenizer_that_make_no_sense(tmp_path: Path) -> None:
    models.save_byte_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "model_max_length": "long"}))
    with pytest.raises(ValueError, match="tokenizer cannot be used: TypeError"):
        encode_prompt(load_tokenizer(tmp_path), "Hi")
    file.write_text(json.dumps({**values, "chat_template": "{# nothing #}"}))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="makes no tokens of ''"):
        encode_prompt(load_tokenizer(tmp_path), "Hi")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[" + "[]," * 3_000_000 + "1]", "more lists and tables than a tokenizer can need"),
        ("9" * 100_000, "Exceeds the limit"),
    ],
    ids=["deep", "lists", "digits"],
)
def test_a_tokenizer_file_that_is_a_bomb(text: str, message: str, tmp_path: Path) -> None:
    models.save_byte_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().rstrip()[:-1] + f', "x": {text}}}')
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
    file.write_text("{}")
    with (tmp_path / "tokenizer_config.json").open("a") as config:
        config.truncate(1 << 33)
    with pytest.raises(ValueError, match=r"tokenizer_config.json has \d+ bytes, more than"):
        load_tokenizer(tmp_path)
