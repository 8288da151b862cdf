"""The sequences of a run, from its settings: tokenised by rank 0, with a progress bar."""

from __future__ import annotations

import sys
from pathlib import Path

from colrow.launch import rank_environment
from colrow.train.batches import Windows
from colrow.train.settings import TrainSettings
from colrow.train.starting_model import describe, tokenizer_name
from colrow.train.tokenize import prepare_tokens, token_path, wait_for_tokens
from colrow.train.tokens import TokenFile

_SECONDS_TO_TOKENISE = 3600.0


def global_rank() -> int:
    """This process's number among all ranks; 0 when nobody started ranks."""
    environment = rank_environment()
    return 0 if environment is None else environment.rank


def training_and_held_out(settings: TrainSettings) -> tuple[Windows, Windows]:
    """Sequences to train on and to evaluate on; the ranks other than 0 wait for the file.

    Raises:
        ValueError: a text that cannot be used; see :func:`colrow.train.tokenize.prepare_tokens`.
        TimeoutError: rank 0's file did not appear.
    """
    training = Windows.of(_tokens(settings, settings.data), settings.sequence)
    if settings.eval_data:
        return training, Windows.of(_tokens(settings, settings.eval_data), settings.sequence)
    return training.split(settings.eval_share)


def _tokens(settings: TrainSettings, text: str) -> TokenFile:
    cache = settings.token_cache or str(Path(settings.output) / "tokens")
    model, name = describe(settings), tokenizer_name(settings)
    end = model.eos_token_ids[0] if model.eos_token_ids else None
    path = token_path(text, name, cache, model.vocab_size, end)
    if path.exists():
        return TokenFile.open(path)
    if global_rank() > 0:
        return wait_for_tokens(path, max(settings.timeout_seconds, _SECONDS_TO_TOKENISE))
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenising {Path(text).name}", total=None)
        return prepare_tokens(
            text,
            name,
            cache,
            vocab_size=model.vocab_size,
            end_token=end,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
