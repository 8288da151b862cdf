"""A run of one block on some of the tokens, with the modules that see whole sequences cut out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from colrow.inplace.find.proof import Proof
from colrow.inplace.find.shard_groups import indices_by_rank
from colrow.inplace.find.simulate import Simulation
from colrow.inplace.observe.calls import Key, ModuleCall, method_argument_names, tensors_of
from colrow.inplace.observe.modes import DropoutSpy
from colrow.inplace.observe.unit import Unit
from colrow.inplace.observe.watch import ValueWatch
from colrow.partition import Partition


class SequenceError(Exception):
    """Why a block's tokens cannot be divided."""


@dataclass
class BlockRun:
    """What happened in a run; the inner modules are cut out of the graph."""

    inputs: dict[str, dict[Key, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # leaves
    given: dict[str, Tensor] = field(default_factory=dict)  # the same for the block
    trees: dict[str, Any] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)
    arguments: dict[Key, Tensor] = field(default_factory=dict)
    dropped: list[tuple[int, ...]] = field(default_factory=list)  # shapes of what is dropped out
    other_dropouts: list[str] = field(default_factory=list)  # that are no product with a mask


def tokens_of(x: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The tokens from the first bound to before the second, of ``[batch, sequence, ..]``."""
    return x[:, bounds[0] : bounds[1]]


def run_block(
    unit: Unit,
    inside: Sequence[str],
    columns: set[str],
    bounds: tuple[int, int] | None,
    trees: Mapping[str, Any],
    hidden: Key,
    watch: ValueWatch | None = None,
    partition: Partition | None = None,
) -> BlockRun:
    """Runs the block; what it is given, and what the modules in it give, are leaves of the graph.

    Args:
        inside: the modules that see whole sequences. Their results are those of ``trees``.
        columns: those of them whose results are whole sequences too.
        bounds: the tokens; None for all, where the modules are run and give ``BlockRun.trees``.
        hidden: the argument that holds the tokens.
        watch: follows what comes of the tokens, outside of the modules that see all.
        partition: of the tokens; needed by ``watch``.

    Raises:
        SequenceError: when one of them is called twice or gives no ``[batch, sequence, hidden]``.
    """
    seen = BlockRun()
    spy = DropoutSpy()

    def leaf(key: Key, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if key == hidden and bounds is not None:
            value = tokens_of(value, bounds)
        value = seen.arguments[key] = value.clone().requires_grad_()
        return followed(value) if key == hidden else value * 1

    def followed(value: Tensor) -> Tensor:
        """Tokens, of which a watch changes those that a rank does not hold."""
        if watch is None or partition is None:
            return value * 1
        if bounds is not None:
            watch.mark(value := value * 1)
            return value
        return watch.source(value * 1, 1, indices_by_rank(partition), scaled=False)

    def replaced(path: str) -> Callable[..., Any]:
        module = unit.module.get_submodule(path)
        names = method_argument_names(type(module).forward)
        factors = unit.factors.get(path)
        own = type(module).forward if factors is None else lambda _, x: factors(x)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if watch is None else watch.elsewhere():
                given = cut(*args, **kwargs)
            if watch is None or path in columns:
                return given
            return pytree.tree_map(lambda x: followed(x) if x is seen.given[path] else x, given)

        def cut(*args: Any, **kwargs: Any) -> Any:
            if path in seen.inputs:
                raise SequenceError(f"{path} is called more than once")
            seen.inputs[path] = ModuleCall(args, kwargs).tensors(names)
            if bounds is None and path not in trees:
                spy.elsewhere = True
                seen.trees[path] = pytree.tree_map(_detached, own(module, *args, **kwargs))
            # Between layers of the block itself there are whole sequences, up to the last.
            spy.elsewhere = path in columns
            part = None if path in columns else bounds
            return _as_leaf(trees.get(path, seen.trees.get(path)), path, seen, part)

        return forward

    forwards = {path: replaced(path) for path in inside} | {"": _spied(unit, spy)}
    result = unit.run(leaf, forwards, watch)
    if watch is not None:
        watch.end(pytree.tree_leaves(result))
    seen.results = tensors_of(result)
    seen.dropped, seen.other_dropouts = spy.seen, spy.others
    return seen


def _spied(unit: Unit, spy: DropoutSpy) -> Callable[..., Any]:
    """The forward of the unit's module inside ``spy``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with spy:
            return type(unit.module).forward(unit.module, *args, **kwargs)

    return forward


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _as_leaf(tree: Any, path: str, seen: BlockRun, bounds: tuple[int, int] | None) -> Any:
    """A result whose first floating-point tensor, these tokens of it, is a leaf."""
    leaves, spec = pytree.tree_flatten(tree)
    for number, value in enumerate(leaves):
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.dim() != 3:
                raise SequenceError(f"{path} does not give [batch, sequence, hidden]")
            part = value if bounds is None else tokens_of(value, bounds)
            seen.outputs[path] = part.clone().requires_grad_()
            # A block may write into what it is given.
            leaves[number] = seen.given[path] = seen.outputs[path] * 1
            break
    return pytree.tree_unflatten(leaves, spec)


@dataclass
class Boundary:
    """A module inside a block that sees whole sequences.

    Attributes:
        name: inside the block.
        gathered: what is gathered for it; whether its gradient is then summed over the ranks, in
            place of the all-reduce at its column-parallel layers.
        row: the row-parallel layer inside whose result is the module's own ("" when it is the
            module), to be reduce-scattered; None when the module's result is cut.
        cut: whether its result has the tokens divided; not where a column-parallel layer lies in
            the block itself, up to the row-parallel one.
    """

    name: str
    gathered: dict[Key, bool]
    row: str | None = None
    cut: bool = True


def merge_collectives(boundary: Boundary, block: Unit, proof: Proof, call: ModuleCall) -> None:
    """Notes where the collectives at a boundary can take the place of those of its layers.

    Args:
        boundary: gets what is found.
        block: the block; ``proof`` and ``call`` are of the module inside it.
    """
    if proof.summed or proof.cuts.outputs or proof.cuts.uncut:
        return
    unit = Unit.of(boundary.name, block.module.get_submodule(boundary.name), call)
    group = proof.group
    given: dict[Key, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {}
    rows: list[Tensor] = []
    spy = DropoutSpy()

    def leaf(key: Key, value: Any) -> Any:
        if isinstance(value, Tensor):
            given[key] = value
        return value

    def column(name: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any) -> Tensor:
            inputs.setdefault(name, []).append(x)
            return unit.factors[name](x)

        return forward

    def row(name: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any) -> Tensor:
            rows.append(unit.factors[name](x))
            return rows[-1]

        return forward

    tables = [name for name in group.columns if name not in unit.factors]
    if tables:
        return
    forwards = {name: column(name) for name in group.columns}
    forwards |= {name: row(name) for name in group.rows} | {"": _spied(unit, spy)}
    unit.training = True
    results = tensors_of(unit.run(leaf, forwards))
    if len(rows) == 1 and results and results[0] is rows[0]:
        (boundary.row,) = group.rows
    unit.training = False
    simulation = Simulation(unit, group, proof.cuts).whole()
    ones = [torch.ones_like(y) for y in simulation.results]
    elsewhere = simulation.gradients(ones)
    for key in boundary.gathered:
        alone = all(x is given.get(key) for xs in inputs.values() for x in xs)
        used = elsewhere.get(("argument", key))
        free = key not in proof.partial_arguments and key not in group.arguments
        boundary.gathered[key] = alone and free and (used is None or not used.any())
