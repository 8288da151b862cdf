"""What a case is: plain data, drawn from options that stand in order, the simplest first."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

import colrow
from colrow.comm.mesh import Mesh

Case = dict[str, Any]
# How often a field takes its simplest option whatever the others are: a case in which everything
# is unusual at once is mostly refused for one thing, and tests nothing else.
_PLAIN = 0.35


@dataclass(frozen=True)
class OneOf:
    """A field that takes one of the options, the simplest standing first."""

    options: Sequence[Any]

    def draw(self, source: random.Random) -> Any:
        if source.random() < _PLAIN:
            return self.options[0]
        return source.choice(self.options)

    def simpler(self, value: Any) -> Iterator[Any]:
        if value in self.options:
            yield from self.options[: self.options.index(value)]


@dataclass(frozen=True)
class Several:
    """A field that is a list, of ``least`` to ``most`` items."""

    item: OneOf | Fields
    most: int
    least: int = 0

    def draw(self, source: random.Random) -> Any:
        return [self.item.draw(source) for _ in range(source.randint(self.least, self.most))]

    def simpler(self, value: Any) -> Iterator[Any]:
        if len(value) > self.least:
            for i in range(len(value)):
                yield value[:i] + value[i + 1 :]
        for i, item in enumerate(value):
            for other in self.item.simpler(item):
                yield [*value[:i], other, *value[i + 1 :]]


@dataclass(frozen=True)
class Fields:
    """A dictionary of fields."""

    fields: Mapping[str, OneOf | Several | Fields]

    def draw(self, source: random.Random) -> Case:
        return {name: field.draw(source) for name, field in self.fields.items()}

    def simpler(self, value: Case) -> Iterator[Case]:
        for name, field in self.fields.items():
            for other in field.simpler(value[name]):
                yield {**value, name: other}


class NotRunError(Exception):
    """The unsplit model itself cannot do this; nothing can be compared."""


@dataclass(frozen=True)
class World:
    """The ranks that run a case, as one of them sees it.

    Attributes:
        rank, size: of this one, and how many there are.
        directory: an empty one, the same for all ranks, which goes when the case is over.
    """

    rank: int
    size: int
    directory: Path

    def mesh(self, *, tp: int = 0, pp: int = 1) -> Mesh:
        """A grid of all ranks; dp is what tp (by default all that pp leaves) and pp leave."""
        return _mesh(tp or self.size // pp, pp)

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()


@cache
def _mesh(tp: int, pp: int) -> Mesh:
    return colrow.init_mesh(tp=tp, pp=pp, device="cpu", engine="gloo")


@dataclass(frozen=True)
class Kind:
    """A kind of case.

    Attributes:
        name: as in ``--only``.
        fields: what varies, for a number of ranks.
        run: on every rank: what is wrong, in sentences. Raises what colrow raises when it refuses
            the case, and :class:`NotRunError` where there is nothing to compare with.
        weight: how often it is drawn, against the others.
    """

    name: str
    fields: Callable[[int], Fields]
    run: Callable[[World, Case], list[str]]
    weight: int = 1

    def draw(self, ranks: int, seed: int, number: int) -> Case:
        """The case of this number: the same at every call."""
        return self.fields(ranks).draw(random.Random(f"{seed}/{self.name}/{number}"))


def grids(ranks: int) -> list[tuple[int, int, int]]:
    """(pp, dp, tp) of every grid that the ranks form, more of tp first."""
    found = [
        (pp, dp, ranks // pp // dp)
        for pp in range(1, ranks + 1)
        for dp in range(1, ranks + 1)
        if ranks % (pp * dp) == 0
    ]
    return sorted(found, key=lambda grid: -grid[2])
