"""What a forward pass does with *divided* values, of which each rank has a part.

Such are a layer's output features, parameters, or tokens. Whatever is computed from them is divided
too, up to where the ranks' parts are put together again. A Python number read from
them is another one on each rank. A maximum, a comparison or a sort across the parts may happen to
give the same for one batch: so it is run again with the values that a rank does not hold changed.
What changes for every rank depends on more than any of them holds.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from colrow.inplace.observe.operations import place_in_code

_LIMIT = 1e-9


@dataclass(frozen=True)
class AnswerStyle:
    """How a run answers comparisons of divided values, so that both answers are seen.

    Attributes:
        number: 0 for always false, 1 for always true, else by the place of the comparison.
        flips: whether an element is answered otherwise when what is compared has changed.
    """

    number: int
    flips: bool = True

    def answer(self, place: str) -> bool:
        """The answer of a comparison in this place."""
        if self.number < 2:
            return bool(self.number)
        return bool(zlib.crc32(place.encode()) >> self.number & 1)


@dataclass(frozen=True)
class _Noted:
    """What an operation got or gave, and where it is in the code.

    Attributes:
        exact: whether any difference counts, or only more than rounding.
        compared: whether its elements are in the same places in every run.
    """

    tensor: Tensor
    place: str
    exact: bool
    compared: bool


class ValueWatch:
    """One forward pass in which divided values are followed.

    Attributes:
        style: how comparisons are answered; None for what they give.
        base: the run with which this is compared; None for one that is compared with.
        rank: whose values stay; those of other ranks are changed. None for no change.
        problem: what the forward reads that differs between the ranks; "" for nothing.
        decided: the first operation that may hide a difference; "" for none.
        backward: whether it is the backward pass that runs now.
        ragged: whether it has tensors whose size depends on divided values.
        places: where it compares.
        touched: where values that are divided are used, outside of what is proven.
    """

    def __init__(
        self,
        style: AnswerStyle | None = None,
        base: ValueWatch | None = None,
        rank: int | None = None,
        after: ValueWatch | None = None,
    ) -> None:
        """
        Args:
            after: the watch over an earlier pass, of which nothing divided may be used.
        """
        self.style, self.base, self.rank = style, base, rank
        self.problem, self.decided, self.ragged = "", "", False
        self.backward = False
        self.places: set[str] = set()
        self.records: list[_Noted] = []
        self._compared: list[list[Tensor]] = []
        self._divided: dict[int, Tensor] = {}  # by storage, which lives as long as the tensor
        self._ragged: dict[int, Tensor] = {}
        self._sources = 0
        self._earlier: dict[int, Tensor] = {}
        if after is not None:
            self._earlier = after._earlier | after._divided
        self.touched: set[str] = set()
        self._elsewhere = self._proven = 0

    def end(self, results: Sequence[Any], *, summed: bool = False) -> None:
        """Judges what the forward gave.

        Args:
            summed: whether the ranks' results are parts of a sum.
        """
        for number, x in enumerate(results):
            if not self.is_divided(x):
                continue
            if not x.is_floating_point():
                self.problem = self.problem or "it gives indices or truth values of divided values"
            elif number and not summed:
                self.note(x, f"result {number}", exact=False)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is computed inside it is not divided."""
        self.begin_elsewhere()
        try:
            yield
        finally:
            self.end_elsewhere()

    def begin_elsewhere(self) -> None:
        """From here on nothing is followed, until the end of it."""
        self._elsewhere += 1

    def end_elsewhere(self) -> None:
        """The end of what is not followed."""
        self._elsewhere -= 1

    def begin_proven(self) -> None:
        """From here on divided values are followed, and may be used, until the end of it."""
        self._proven += 1

    def end_proven(self) -> None:
        """The end of what is proven."""
        self._proven -= 1

    @property
    def judges(self) -> bool:
        """Whether uses of divided values are to be noted."""
        return not self._proven

    @property
    def follows(self) -> bool:
        """Whether operations are followed now."""
        return not self._elsewhere

    def is_divided(self, x: Any) -> bool:
        """Whether a rank has a part of this, or computes it from its part."""
        return isinstance(x, Tensor) and _key(x) in self._divided

    def unmark(self, x: Tensor) -> None:
        """From now on this is not divided: every rank has all of it."""
        self._divided.pop(_key(x), None)

    def outlives(self) -> bool:
        """Whether something divided is kept when nothing of this pass is used any more.

        The watch itself forgets what was divided.
        """
        kept = [StorageWeakRef(x.untyped_storage()) for x in self._divided.values()]
        self._divided.clear()
        self._ragged.clear()
        self._compared.clear()
        self.records.clear()
        if all(ref.expired() for ref in kept):
            return False
        gc.collect()
        return not all(ref.expired() for ref in kept)

    @property
    def remembers(self) -> bool:
        """Whether an earlier pass left something behind."""
        return bool(self._earlier)

    def is_earlier(self, x: Any) -> bool:
        """Whether an earlier pass left this behind."""
        return isinstance(x, Tensor) and _key(x) in self._earlier

    def sees_earlier(self, leaves: Sequence[Any], written: Sequence[Any]) -> None:
        """Notes the use of what an earlier pass left behind.

        Args:
            leaves: what an operation is given.
            written: what of it is overwritten, whatever it was.
        """
        for x in leaves:
            if not self.is_earlier(x):
                continue
            if not any(x is y for y in written):
                self.reads("what an earlier call kept of divided values")
            elif x.numel() * x.element_size() == x.untyped_storage().nbytes():
                del self._earlier[_key(x)]

    def is_ragged(self, x: Any) -> bool:
        """Whether its size depends on divided values."""
        return isinstance(x, Tensor) and _key(x) in self._ragged

    def mark(self, x: Tensor, *, ragged: bool = False) -> None:
        """From now on this is divided; ``ragged`` if its size depends on divided values too."""
        self._divided[_key(x)] = x
        if ragged:
            self.ragged = True
            self._ragged[_key(x)] = x

    def source(
        self, x: Tensor, dim: int, held: list[list[int]], *, period: int = 0, scaled: bool
    ) -> Tensor:
        """Marks ``x``; where one rank's values are to stay, those of the others are changed.

        Args:
            held: for each rank, the indices along ``dim`` that it holds.
            period: held repeats along ``dim`` after so many indices; 0 for all of them.
            scaled: whether the change keeps signs, as a logarithm of a parameter needs.
        """
        with self.elsewhere():
            if self.rank is not None:
                self._sources += 1
                generator = torch.Generator().manual_seed(self._sources * 100 + self.rank)
                noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
                if scaled:
                    fresh = x * (1 + noise.abs())
                else:
                    spread = x.std() if x.numel() > 1 else x.abs().sum()
                    fresh = noise * 3 * spread.clamp_min(0.1)
                stays = torch.zeros(period or x.shape[dim], dtype=torch.bool)
                stays[held[self.rank]] = True
                shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
                x = torch.where(stays.repeat(x.shape[dim] // len(stays)).view(shape), x, fresh)
        self.mark(x)
        return x

    def reads(self, what: str) -> None:
        """Notes that a number leaves the tensors."""
        place = place_in_code()
        if not self.backward:
            self.problem = self.problem or f"its forward reads {what}{place}"
        elif place:  # not autograd itself
            self.problem = self.problem or f"its backward reads {what}{place}"

    def note(self, x: Tensor, place: str, *, exact: bool) -> None:
        """Keeps a tensor to be compared in other runs."""
        compared = not (self.is_ragged(x) and self.style is not None and self.style.flips)
        self.records.append(_Noted(x.detach().clone(), place, exact, compared))

    def answers(self, given: Sequence[Tensor], result: Tensor, place: str) -> None:
        """Answers a comparison of ``given`` by the style, into ``result``."""
        if self.style is None:
            return
        number = len(self._compared)
        self._compared.append([x.detach().clone() for x in given])
        answer = torch.full_like(result, self.style.answer(place))
        if self.base is not None and self.style.flips and number < len(self.base._compared):
            for x, y in zip(given, self.base._compared[number], strict=False):
                if x.shape == y.shape:
                    answer ^= _differs(x, y, exact=True)
        result.copy_(answer)

    def changed(self) -> list[Tensor] | None:
        """For each record the elements that are not those of the base; None for other records."""
        assert self.base is not None
        mine, others = self.records, self.base.records
        if [r.place for r in mine] != [r.place for r in others]:
            return None
        return [
            torch.zeros((), dtype=torch.bool)
            if not (r.compared and other.compared)
            else _differs(r.tensor, other.tensor, exact=r.exact)
            if r.tensor.shape == other.tensor.shape
            else torch.ones((), dtype=torch.bool)
            for r, other in zip(mine, others, strict=True)
        ]


def _differs(a: Tensor, b: Tensor, *, exact: bool) -> Tensor:
    other = a != b
    if a.is_floating_point():
        other &= ~(a.isnan() & b.isnan())
        finite = b[torch.isfinite(b)]
        if not exact and finite.numel():
            limit = _LIMIT * max(float(finite.abs().max()), 1e-3)
            other &= ~((a - b).abs() <= limit)
    return other


def _key(x: Tensor) -> int:
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without memory of its own
        return id(x)
