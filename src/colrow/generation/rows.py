"""The answers of a batch as they grow, row by row, and the steps that are complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Rows:
    """New tokens of every row, whichever part of the batch they come from first.

    Args:
        count: rows of the batch.
        eos_token_ids: a row ends with the first of these.
        padding: what stands behind a row's end.
        on_tokens: called with the new token of every row, step by step, as soon as all are known.
    """

    def __init__(
        self,
        count: int,
        eos_token_ids: Sequence[int],
        padding: int,
        on_tokens: Callable[[list[int]], None] | None,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.finished = [False] * count
        self.first_token_at = 0.0
        self._ends, self._padding, self._on_tokens = eos_token_ids, padding, on_tokens
        self._reported = 0

    def add(self, start: int, chosen: Sequence[int]) -> None:
        """Takes the next token of the rows from ``start`` on; those that have ended ignore it."""
        for row, token in enumerate(chosen, start):
            if not self.finished[row]:
                self.tokens[row].append(token)
                self.finished[row] = token in self._ends
        while self._reported < self.steps and self._known(self._reported):
            if self._reported == 0:
                self.first_token_at = time.perf_counter()
            self._reported += 1
            if self._on_tokens is not None:
                self._on_tokens(self.step(self._reported - 1))

    @property
    def steps(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in self.tokens)

    def step(self, number: int, start: int = 0, stop: int | None = None) -> list[int]:
        """The rows' tokens of a step, padding where a row has ended before."""
        rows = self.tokens[start:stop]
        return [row[number] if number < len(row) else self._padding for row in rows]

    def ended(self, start: int = 0, stop: int | None = None) -> bool:
        """Whether all these rows have."""
        return all(self.finished[start:stop])

    def _known(self, step: int) -> bool:
        return all(
            step < len(row) or finished
            for row, finished in zip(self.tokens, self.finished, strict=True)
        )
