"""Column-then-row groups inside a module, found from what reaches what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from colrow.inplace.atoms import connected, distribute, holders, members
from colrow.inplace.calls import Key
from colrow.inplace.probe import Reach

_MOST_SIZES = 6

Rows = list[list[int]]
"""For each rank, the indices that it holds, ascending."""


@dataclass
class Group:
    """Layers that are split together.

    Attributes:
        columns: column-parallel layers: the output features of each rank.
        rows: row-parallel layers: the input features of each rank.
        parameters: parameters used directly that are split: dimension and indices of each rank.
        arguments: tensors given to the module of which a rank needs a part: dimension, period
            (the pattern repeats along the dimension, as when heads lie inside the batch), and the
            indices of each rank inside a period.
        atoms: how many pieces there were to give to the ranks.
    """

    columns: dict[str, Rows]
    rows: dict[str, Rows]
    parameters: dict[str, tuple[int, Rows]] = field(default_factory=dict)
    arguments: dict[Key, tuple[int, int, Rows]] = field(default_factory=dict)
    atoms: int = 0


@dataclass
class Found:
    """Groups, and for layers that might have been in one, why they are not."""

    groups: list[Group] = field(default_factory=list)
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
) -> Found:
    """Groups of layers among ``free`` that can be torn into at least ``ranks`` pieces.

    Args:
        strided: whether a rank gets every ``ranks``-th piece, instead of neighbours.
    """
    found = Found()
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
    found: Found,
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
    atoms = connected(domain.width, kept)
    if len(atoms) < ranks:
        atoms = _finer(domain, kept, ranks) or atoms
    if len(atoms) < max(2, ranks):
        for name in (*sources, *targets):
            found.reasons[name] = f"cannot be torn into {max(2, ranks)} pieces: it has {len(atoms)}"
        return
    shares = distribute(atoms, ranks, strided=strided)
    group = Group({}, {}, atoms=len(atoms))
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
    _split_parameters(domain, targets, atoms, shares, group)
    if reason := _split_arguments(domain, targets, atoms, shares, group):
        for name in (*sources, *targets):
            found.reasons[name] = reason
        return
    found.groups.append(group)


def _finer(domain: _Domain, ties: list[int], ranks: int) -> list[int] | None:
    """Atoms where some rows are held by several ranks: KV heads, when there are more ranks.

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
        atoms = connected(domain.width, kept)
        if len(atoms) < ranks:
            continue
        shares = distribute(atoms, ranks)
        held = sum(1 for tie in ties for share in shares if tie & share)
        if best is None or held < best[0]:
            best = held, atoms
    return best[1] if best else None


def _along(domain: _Domain, by_target: dict[str, list[int]], atoms: list[int]) -> list[int] | None:
    """What each index reaches, if no index reaches two atoms and some reach one; else None."""
    length = len(next(iter(by_target.values())))
    joined = [domain.joined(by_target, i) for i in range(length)]
    if not any(joined):
        return None
    inside = all(sum(1 for atom in atoms if atom & mask) <= 1 for mask in joined if mask)
    return joined if inside and len(atoms) > 1 else None


def _split_parameters(
    domain: _Domain, targets: list[str], atoms: list[int], shares: list[int], group: Group
) -> None:
    keys = {key for b in targets for key in domain.reaches[b].parameters}
    for name, dim in sorted(keys):
        if name in group.parameters:
            continue
        by_target = {
            b: domain.reaches[b].parameters[name, dim]
            for b in targets
            if (name, dim) in domain.reaches[b].parameters
        }
        joined = _along(domain, by_target, atoms)
        if joined is not None:
            group.parameters[name] = (dim, holders(joined, shares))


def _split_arguments(
    domain: _Domain, targets: list[str], atoms: list[int], shares: list[int], group: Group
) -> str | None:
    keys = {key for b in targets for key in domain.reaches[b].arguments}
    for key, dim in sorted(keys):
        if key in group.arguments:
            continue
        by_target = {
            b: domain.reaches[b].arguments[key, dim]
            for b in targets
            if (key, dim) in domain.reaches[b].arguments
        }
        joined = _along(domain, by_target, atoms)
        if joined is None:
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
