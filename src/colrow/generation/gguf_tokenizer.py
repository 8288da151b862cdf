"""The tokenizer inside a GGUF file, cut as llama.cpp cuts text.

transformers builds it, and takes GPT-2's way of cutting text into words for every kind of
``tokenizer.ggml.pre`` that it does not know. Here each kind is known or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colrow.checkpoint.gguf_file import GGUFTensorReader

_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
_OF_TRANSFORMERS = {*_LLAMA3, "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "megrez", "qwen35"}
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais"}
_SINGLE_DIGITS = {
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
# llama.cpp's own, for files that do not say: punctuation alone, then words, then digits by threes.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def load_gguf_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a GGUF file, with what it leaves out of the file's settings.

    Raises:
        ValueError: a kind of tokenizer, or of cutting text into words, that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    with GGUFTensorReader(path) as reader:
        kind = reader.metadata_value("tokenizer.ggml.model")
        words = reader.metadata_value("tokenizer.ggml.pre") or "default"
        adds = {
            name: reader.metadata_value(f"tokenizer.ggml.add_{name}")
            for name in ("bos_token", "eos_token", "space_prefix")
        }
    known = {"default", *_OF_TRANSFORMERS, *_GPT2, *_SINGLE_DIGITS}
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported: gpt2 and llama are")
    if kind == "gpt2" and words not in known:
        raise ValueError(
            f"tokenizer.ggml.pre={words!r} is not supported: {', '.join(sorted(known))} are"
        )
    if adds["eos_token"]:
        raise ValueError(
            "tokenizer.ggml.add_eos_token is set, which ends every prompt before its answer"
        )
    # AutoTokenizer reads the whole metadata a second time, for seconds, to come to this.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    backend = tokenizer.backend_tokenizer
    if kind == "llama" and adds["space_prefix"] is False:
        _without_space_prefix(backend)
    elif kind == "gpt2":
        _cut(backend, str(words))
        if words in {*_LLAMA3, "tekken"}:
            backend.model.ignore_merges = True
            if adds["bos_token"] is None:
                tokenizer.add_bos_token = True
    return tokenizer


def _cut(backend: Any, words: str) -> None:
    """Sets how text is cut into words, where transformers takes GPT-2's way for lack of another."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any]
    if words in _SINGLE_DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
        ending = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif words == "default":
        steps = [pre_tokenizers.Split(Regex(step), "isolated") for step in _DEFAULT]
        ending = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        return
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, ending])


def _without_space_prefix(backend: Any) -> None:
    """A SentencePiece text begins with what it begins with."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
