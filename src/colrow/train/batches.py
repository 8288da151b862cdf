"""Which tokens are in which step: a function of the seed and the step, not of the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from colrow import rng
from colrow.train.tokens import TokenFile

IGNORED = -100


@dataclass(frozen=True)
class Windows:
    """A token file, packed: cut into sequences without padding.

    Sequences overlap by one token, so that each token is predicted once. Documents follow one
    another in a sequence, divided by their end token.

    Attributes:
        tokens: the file.
        sequence: tokens of a sequence.
        first, count: which of its sequences are meant.
    """

    tokens: TokenFile
    sequence: int
    first: int
    count: int

    @classmethod
    def of(cls, tokens: TokenFile, sequence: int) -> Windows:
        """All whole sequences of the file.

        Raises:
            ValueError: when there is none.
        """
        if sequence < 2:
            raise ValueError(f"sequence={sequence}: must be at least 2, a token and the next")
        count = max(0, (len(tokens) - 1) // (sequence - 1))
        if count == 0:
            raise ValueError(
                f"{tokens.path} has {len(tokens)} tokens, not enough for one sequence of {sequence}"
            )
        return cls(tokens, sequence, 0, count)

    def split(self, held_out_share: float) -> tuple[Windows, Windows]:
        """Sequences to train on, and the last ones, which are held out."""
        held = round(self.count * held_out_share)
        if not 0 < held < self.count:
            raise ValueError(
                f"a held-out share of {held_out_share} of {self.count} sequences leaves nothing on "
                "one side; use a longer text, a shorter sequence or another share"
            )
        middle = self.count - held
        return (
            Windows(self.tokens, self.sequence, self.first, middle),
            Windows(self.tokens, self.sequence, self.first + middle, held),
        )

    def get(self, numbers: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``labels``, ``[len(numbers), sequence]`` int64.

        Labels are the ids, with -100 where predicting the token does not count.
        """
        starts = (numbers + self.first) * (self.sequence - 1)
        index = starts[:, None] + np.arange(self.sequence)
        ids = torch.from_numpy(self.tokens.ids[index].astype(np.int64))
        if self.tokens.counted is None:
            return ids, ids
        counted = torch.from_numpy(np.asarray(self.tokens.counted[index]))
        return ids, ids.masked_fill(~counted, IGNORED)


class Order:
    """The sequences of a training run in order: all of them, shuffled, again and again.

    Sample ``i`` of the run is a function of the seed and ``i``. A step takes the next
    ``global_batch`` of them, whatever the ranks are.

    Args:
        windows: the sequences.
        seed: of the shuffling; each epoch has another order.
    """

    def __init__(self, windows: Windows, seed: int) -> None:
        self.windows, self._seed = windows, seed
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples ``first`` to ``first + count`` of the run, see :meth:`Windows.get`."""
        return self.windows.get(self.numbers(first, count))

    def numbers(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Which sequences these samples are."""
        length = self.windows.count
        samples = np.arange(first, first + count)
        return np.array([self._epoch(int(s) // length)[int(s) % length] for s in samples], np.int64)

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            generator = np.random.Generator(
                np.random.Philox(rng.stream_key(self._seed, "order", epoch))
            )
            self._epochs[epoch] = generator.permutation(self.windows.count)
        return self._epochs[epoch]
