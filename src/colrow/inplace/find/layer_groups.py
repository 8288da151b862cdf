"""Groups of column- and row-parallel layers inside a module, found from what reaches what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from colrow.inplace.find.shard_groups import connected, distribute, holders, members
from colrow.inplace.observe.calls import Key
from colrow.inplace.observe.reach import Reach

_MOST_SIZES = 6

IndicesByRank = list[list[int]]
"""For each rank, the indices that it holds, ascending."""


@dataclass
class LayerGroup:
    """Layers that are split together.

    Attributes:
        columns: column-parallel layers: the output features of each rank.
        rows: row-parallel layers: the input features of each rank.
        parameters: parameters used directly that are split: dimension and indices of each rank.
        arguments: tensors given to the module of which a rank needs a part: dimension, period
            (the pattern repeats along the dimension, as when heads lie inside the batch), and the
            indices of each rank inside a period.
        shard_groups: how many there were to give to the ranks.
    """

    columns: dict[str, IndicesByRank]
    rows: dict[str, IndicesByRank]
    parameters: dict[str, tuple[int, IndicesByRank]] = field(default_factory=dict)
    arguments: dict[Key, tuple[int, int, IndicesByRank]] = field(default_factory=dict)
    shard_groups: int = 0


@dataclass
class FoundGroups:
    """Groups of layers to be split together; for layers that might have been in one, why not."""

    groups: list[LayerGroup] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


class _Domain:
    """The input features of several layers side by side, so that one set speaks of all."""

    def __init__(self, reaches: Mapping[str, Reach], names: list[str]) -> None:
        self.reaches = {name: reaches[name] for name in names}
        self.offsets: dict[str, int] = {}
        self.width = 0
        for name in names:
            self.offsets[name] = self.width
            self.width += reaches[name].width

    def joined(self, masks: Mapping[str, list[int]], row: int) -> int:
        """What a row reaches, everywhere."""
        return sum(masks[n][row] << self.offsets[n] for n in self.offsets if n in masks)

    def narrow(self, masks: Mapping[str, list[int]], row: int) -> int:
        """What a row reaches where it does not reach everything: what it ties together."""
        return sum(
            masks[n][row] << self.offsets[n]
            for n in self.offsets
            if n in masks and masks[n][row] != self.reaches[n].everything
        )


def find_groups(
    reaches: Mapping[str, Reach], free: set[str], ranks: int, *, strided: bool = False
) -> FoundGroups:
    """Groups of layers among ``free`` that fall into at least ``ranks`` shard groups.

    Args:
        strided: whether a rank gets every ``ranks``-th shard group, instead of neighbours.
    """
    found = FoundGroups()
    feeds: dict[str, set[str]] = {}
    for target, reach in reaches.items():
        for source, masks in reach.outputs.items():
            if any(masks):
                feeds.setdefault(source, set()).add(target)
    pairs = {
        (source, target)
        for source, targets in feeds.items()
        for target in targets
        if {source, target} <= free
        and source != target
        and _is_sparse(reaches[target].outputs[source], reaches[target].everything)
    }
    for sources, targets in _linked(pairs):
        _group(reaches, feeds, sources, targets, ranks, strided, found)
    return found


def _is_sparse(masks: list[int], everything: int) -> bool:
    return any(mask and mask != everything for mask in masks)


def _linked(pairs: set[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
    """Sources and targets that hang together."""
    groups: list[tuple[set[str], set[str]]] = []
    for source, target in sorted(pairs):
        sources, targets = {source}, {target}
        rest = []
        for group in groups:
            if source in group[0] or target in group[1]:
                sources |= group[0]
                targets |= group[1]
            else:
                rest.append(group)
        groups = [*rest, (sources, targets)]
    return [(sorted(a), sorted(b)) for a, b in groups]


def _group(
    reaches: Mapping[str, Reach],
    feeds: Mapping[str, set[str]],
    sources: list[str],
    targets: list[str],
    ranks: int,
    strided: bool,
    found: FoundGroups,
) -> None:
    for source in list(sources):
        if both := feeds[source] - set(targets):
            found.reasons[source] = f"also feeds {', '.join(sorted(both))}, which is not split"
            sources.remove(source)
    domain = _Domain(reaches, targets)
    masks = {
        a: {b: reaches[b].outputs[a] for b in targets if a in reaches[b].outputs} for a in sources
    }
    rows = {a: range(len(next(iter(masks[a].values())))) for a in sources}
    ties = {a: [domain.narrow(masks[a], i) for i in rows[a]] for a in sources}
    everything = (1 << domain.width) - 1
    kept = [tie for a in sources for tie in ties[a] if tie]
    covered = 0
    for tie in kept:
        covered |= tie
    if covered != everything:
        for name in targets:
            found.reasons.setdefault(name, "part of its input does not come from a split layer")
        return
    shard_groups = connected(domain.width, kept)
    if len(shard_groups) < ranks:
        shard_groups = _finer(domain, kept, ranks) or shard_groups
    if len(shard_groups) < max(2, ranks):
        for name in (*sources, *targets):
            found.reasons[name] = (
                f"cannot be torn into {max(2, ranks)} pieces: it has {len(shard_groups)}"
            )
        return
    shares = distribute(shard_groups, ranks, strided=strided)
    group = LayerGroup({}, {}, shard_groups=len(shard_groups))
    for a in sources:
        group.columns[a] = holders([domain.joined(masks[a], i) for i in rows[a]], shares)
    for b in targets:
        mine = (1 << reaches[b].width) - 1
        grain, width = reaches[b].grain, reaches[b].features
        units = [members(share >> domain.offsets[b] & mine) for share in shares]
        group.rows[b] = [
            [j for unit in held for j in range(unit * grain, min((unit + 1) * grain, width))]
            for held in units
        ]
    _split_parameters(domain, shard_groups, shares, group)
    if reason := _split_arguments(domain, shard_groups, shares, group):
        for name in (*sources, *targets):
            found.reasons[name] = reason
        return
    found.groups.append(group)


def _finer(domain: _Domain, ties: list[int], ranks: int) -> list[int] | None:
    """Shard groups where some rows are held by several ranks: KV heads, when there are more ranks.

    Ties of one size (a query head's, a KV head's, ...) are kept or given up together, so that as
    few rows as possible are held more than once.
    """
    everything = (1 << domain.width) - 1
    sizes = sorted({tie.bit_count() for tie in ties})[:_MOST_SIZES]
    best: tuple[int, list[int]] | None = None
    for chosen in product((True, False), repeat=len(sizes)):
        of = {size for size, keep in zip(sizes, chosen, strict=True) if keep}
        kept = [tie for tie in ties if tie.bit_count() in of]
        covered = 0
        for tie in kept:
            covered |= tie
        if covered != everything:
            continue
        shard_groups = connected(domain.width, kept)
        if len(shard_groups) < ranks:
            continue
        shares = distribute(shard_groups, ranks)
        held = sum(1 for tie in ties for share in shares if tie & share)
        if best is None or held < best[0]:
            best = held, shard_groups
    return best[1] if best else None


def _reached(
    domain: _Domain, tables: Mapping[str, Mapping[Any, list[int]]], shard_groups: list[int]
) -> Iterator[tuple[Any, list[int]]]:
    """Dimensions whose indices each reach at most one shard group, and what each index reaches.

    Args:
        tables: by layer, what reaches its input: for each tensor and dimension, by index.
    """
    for key in sorted({key for table in tables.values() for key in table}):
        by_target = {b: table[key] for b, table in tables.items() if key in table}
        length = len(next(iter(by_target.values())))
        joined = [domain.joined(by_target, i) for i in range(length)]
        crossing = any(sum(1 for g in shard_groups if g & mask) > 1 for mask in joined)
        if any(joined) and not crossing and len(shard_groups) > 1:
            yield key, joined


def _split_parameters(
    domain: _Domain, shard_groups: list[int], shares: list[int], group: LayerGroup
) -> None:
    tables = {b: reach.parameters for b, reach in domain.reaches.items()}
    for (name, dim), joined in _reached(domain, tables, shard_groups):
        if name not in group.parameters:
            group.parameters[name] = (dim, holders(joined, shares))


def _split_arguments(
    domain: _Domain, shard_groups: list[int], shares: list[int], group: LayerGroup
) -> str | None:
    tables = {b: reach.arguments for b, reach in domain.reaches.items()}
    for (key, dim), joined in _reached(domain, tables, shard_groups):
        if key in group.arguments:
            continue
        period = _period(joined)
        if period >= max(reach.features for reach in domain.reaches.values()):
            return f"its input also comes from {key[0]}, without a split layer in between"
        group.arguments[key] = (dim, period, holders(joined[:period], shares))
    return None


def _period(values: list[int]) -> int:
    """The shortest period of a sequence among the divisors of its length."""
    for period in range(1, len(values) + 1):
        if len(values) % period == 0 and values == values[:period] * (len(values) // period):
            return period
    return len(values)
