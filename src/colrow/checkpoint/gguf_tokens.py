"""Special tokens of GGUF files: those that end an answer, as llama.cpp finds them.

A file names some by keys, and llama.cpp's vocabulary loader knows others by their text, since many
files name only one of the tokens that their models end an answer with.
"""

from __future__ import annotations

from collections.abc import Mapping

from colrow.checkpoint.gguf_file import GGUFTensorReader

# Ends of a text, a turn or a message, by their text.
_ENDS = {
    "</s>",
    "<EOT>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|call|>",
    "<|calls|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|flush|>",
    "<|im_end|>",
    "<|return|>",
    "<|tool_response>",
    "[EOS]",
    "[EOT]",
    "_<EOT>",
}
# Tokens of code completion that end one: the key of each, and its texts where the key is missing.
_CODE: Mapping[str, set[str]] = {
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
}
# In vocabularies of these, a token is a mark inside an answer and not its end.
_NOT_AN_END = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|call|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
_NAMED = ("eos", "eot", "eom")


def token_id(reader: GGUFTensorReader, name: str) -> int | None:
    """A special token that a key names; a SentencePiece vocabulary has defaults for two.

    Raises:
        ValueError: a number outside the vocabulary.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    value = reader.metadata_value(key)
    if value is None and reader.metadata_value("tokenizer.ggml.model") == "llama":
        return {"bos": 1, "eos": 2}.get(name)
    size = reader.shape("token_embd.weight")[0]
    if value is not None and not (isinstance(value, int) and 0 <= value < size):
        raise ValueError(
            f"{reader.description} has {key}={value!r}, which is no token of its {size}"
        )
    return value


def named_ends(reader: GGUFTensorReader) -> tuple[int, ...]:
    """End of sequence, of turn and of message, as far as keys name them; in this order."""
    found = (token_id(reader, name) for name in _NAMED)
    return tuple(dict.fromkeys(token for token in found if token is not None))


def all_ends(reader: GGUFTensorReader) -> tuple[int, ...]:
    """Every token that ends an answer: those that keys name, then those known by their text."""
    tokens = reader.metadata_value("tokenizer.ggml.tokens")
    known = {text: index for index, text in enumerate(tokens)} if isinstance(tokens, list) else {}
    found = [*named_ends(reader)]
    for name, texts in _CODE.items():
        named = token_id(reader, name)
        found += (
            [known[text] for text in sorted(texts & known.keys())] if named is None else [named]
        )
    found += sorted(known[text] for text in _ENDS & known.keys())
    kept = {known[end] for signs, end in _NOT_AN_END if end in known and signs <= known.keys()}
    return tuple(token for token in dict.fromkeys(found) if token not in kept)
