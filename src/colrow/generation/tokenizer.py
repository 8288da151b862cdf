"""Text to tokens and back: a checkpoint's tokenizer, its chat template, and text as it arrives."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.opening import open_reader
from colrow.files import INDEX_BYTES, read_json, shown
from colrow.generation.template import RENDERER
from colrow.generation.tokenizer_limits import check_growth, check_numbers, check_vocabulary

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NEEDS_EXTRA = "reading a tokenizer needs the package {name}: pip install 'colrow[models]'"


class Encoding(Protocol):
    """What a tokenizer makes of a text."""

    input_ids: list[int]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that generation uses."""

    chat_template: object
    special_tokens_map: dict[str, object]

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """Tokens of a text."""
        ...

    def get_chat_template(self) -> str:
        """The template of an ordinary conversation, where there are several."""
        ...

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """Text of tokens."""
        ...


def load_tokenizer(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: of a directory, a cached hub id, or inside a ``.gguf`` file.

    Runs no code of the checkpoint and downloads nothing.

    Raises:
        ValueError: when there is none, or transformers is not installed.
    """
    path = resolve_model_path(path_or_id)
    directory = path if path.is_dir() else path.parent
    if path.suffix == ".gguf":
        open_reader(path).close()  # transformers follows whatever lengths the file states
    if (directory / "tokenizer.json").exists():
        check_vocabulary(directory / "tokenizer.json")
    for name in _SMALL_FILES:
        if (directory / name).exists():
            read_json(directory / name, INDEX_BYTES)
    try:
        from transformers import AutoTokenizer

        from colrow.generation.gguf_tokenizer import load_gguf_tokenizer
    except ModuleNotFoundError as cause:
        raise ValueError(_NEEDS_EXTRA.format(name=cause.name)) from cause
    try:
        if path.suffix == ".gguf":
            tokenizer = load_gguf_tokenizer(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory),
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as cause:  # transformers raises many kinds for files that are not right
        raise ValueError(
            f"no tokenizer could be read from {path}: {_reason(path, cause)}"
        ) from cause
    check_numbers(tokenizer, directory)
    check_growth(tokenizer, path)
    return cast(Tokenizer, tokenizer)


def _reason(path: Path, cause: Exception) -> str:
    if isinstance(cause, RecursionError):
        return "its files are nested too deeply"
    directory = path if path.is_dir() else path.parent
    if path.suffix != ".gguf" and not any(any(directory.glob(name)) for name in _FILES):
        return (
            f"{directory} has none of {', '.join(_FILES)}; copy the files of the tokenizer there "
            "that the model was trained with (a model trained on bytes has none)"
        )
    return str(cause).strip().partition("\n")[0].rstrip(":") or type(cause).__name__


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, *, system: str | None = None, chat: bool = True
) -> list[int]:
    """Tokens of a prompt, as a user's message where the tokenizer has a chat template.

    Args:
        system: the system message before it; None leaves it to the template.
        chat: False takes the prompt as it is.

    Raises:
        ValueError: an empty prompt, or a system message that cannot be used.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if not chat or not tokenizer.chat_template:
        if system is not None:
            why = "without a chat template" if chat else "when the chat template is not used"
            raise ValueError(f"a system message has no place {why}: put it into the prompt")
        return _tokens(tokenizer, prompt, add_special_tokens=True)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return _tokens(tokenizer, render_chat(tokenizer, messages), add_special_tokens=False)


def _tokens(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        tokens = list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
    except Exception as error:  # of many classes, for settings of its files that make no sense
        raise ValueError(
            f"the model's tokenizer cannot be used: {type(error).__name__}: {error}"
        ) from error
    if not tokens:
        raise ValueError(f"the model's tokenizer makes no tokens of {shown(text)}")
    return tokens


def render_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    """A conversation as the model was trained on it, up to where the answer begins.

    The text is that of transformers' ``apply_chat_template``; the template is rendered in a process
    of its own, which may take little time and memory.

    Args:
        messages: each with ``role`` and ``content``.

    Raises:
        ValueError: the template refuses the messages, makes no sense or takes too much.
    """
    template = tokenizer.get_chat_template()
    if not isinstance(template, str):
        raise ValueError(f"the model's chat template is no text: {shown(template)}")
    variables = {
        **{name: _plain(value) for name, value in tokenizer.special_tokens_map.items()},
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    try:
        return RENDERER.render(template, variables)
    except ModuleNotFoundError as cause:
        raise ValueError(_NEEDS_EXTRA.format(name=cause.name)) from cause


def _plain(value: object) -> object:
    """A special token, or several, as JSON has them."""
    if isinstance(value, list | tuple):
        return [str(each) for each in value]
    return None if value is None else str(value)


def end_tokens(
    path_or_id: str | Path, configured: tuple[int, ...], tokenizer: Tokenizer | None = None
) -> tuple[int, ...]:
    """Tokens that end an answer.

    Those of the configuration, of ``generation_config.json`` and of the tokenizer; of a GGUF file
    all that llama.cpp knows, by keys and by their text.

    Args:
        configured: the configuration's, which come first.
        tokenizer: of the checkpoint.

    Raises:
        ValueError: a ``generation_config.json`` that is none.
    """
    path = resolve_model_path(path_or_id)
    own = getattr(tokenizer, "eos_token_id", None)
    more = [own] if isinstance(own, int) else []
    if path.suffix == ".gguf":
        from colrow.checkpoint.gguf_file import GGUFTensorReader
        from colrow.checkpoint.gguf_tokens import all_ends

        with GGUFTensorReader(path) as reader:
            return tuple(dict.fromkeys([*configured, *all_ends(reader), *more]))
    file = (path if path.is_dir() else path.parent) / "generation_config.json"
    if file.is_file():
        try:
            found = read_json(file).get("eos_token_id")
        except AttributeError as cause:
            raise ValueError(f"{file} is not a generation configuration: {cause}") from cause
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
            raise ValueError(
                f"{file}: eos_token_id={shown(found)} should be a token or a list of them"
            )
        more = [*listed, *more]
    return tuple(dict.fromkeys([*configured, *more]))


class TextStream:
    """Text of tokens that come one at a time; a character appears once all its bytes are there.

    Special tokens are left out. A token's text may depend on the one before it (spaces, bytes of a
    character), so each piece is the difference of decoding a short window with and without it,
    which costs the same at every length.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # of the window
        self._shown = 0  # tokens whose text has been given

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is not complete."""
        self._tokens.append(token)
        piece, window = self._new_text()
        if not piece or window.endswith(_REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return piece

    def finish(self) -> str:
        """What is left: bytes that never became a character, as replacement characters."""
        piece, _ = self._new_text()
        self._shown = len(self._tokens)
        return piece

    def _new_text(self) -> tuple[str, str]:
        before = self._decode(self._tokens[self._start : self._shown])
        window = self._decode(self._tokens[self._start :])
        return window[len(before) :], window

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
