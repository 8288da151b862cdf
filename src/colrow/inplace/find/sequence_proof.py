"""The proof of one block whose tokens are divided: the ranks' parts are run against the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.find.proof import Proof, close, largest, near, sum_of
from colrow.inplace.find.sequence_run import (
    BlockRun,
    Boundary,
    SequenceError,
    merge_collectives,
    run_block,
    tokens_of,
)
from colrow.inplace.observe.calls import Key, ModuleCall
from colrow.inplace.observe.decisions import DecisionError, check_decisions, check_memory
from colrow.inplace.observe.reach import random_like
from colrow.inplace.observe.unit import Unit, UnitError
from colrow.inplace.observe.watch import ValueWatch
from colrow.partition import Partition

_TOKENS = 1


@dataclass
class Block:
    """What was proven of a block.

    Attributes:
        boundaries: the modules inside it that see whole sequences.
        shared: its parameters outside those; each rank has their gradient for its own tokens.
        drops: whether it drops out activations outside those.
    """

    boundaries: list[Boundary]
    shared: list[str]
    drops: bool


def prove_block(
    name: str,
    module: nn.Module,
    call: ModuleCall,
    hidden: Key,
    whole_inside: Sequence[str],
    proofs: Mapping[str, list[Proof]],
    calls: Mapping[str, ModuleCall],
    ranks: int,
) -> Block:
    """The proof that all of a block but some modules inside works on tokens one by one.

    Args:
        whole_inside: those modules, which see whole sequences.
        proofs: of the modules inside the block, and ("") of the block itself.

    Raises:
        SequenceError: when it does not.
    """
    own = _own_layers(proofs.get("", []))
    whole_inside = [*whole_inside, *own]
    try:
        unit = Unit.of(name, module, call)
        loose = [n for n in unit.linears if not _inside(n, whole_inside)]
        if loose:
            raise SequenceError(f"{loose[0]} lies outside the modules that are split")
        boundaries: list[Boundary] = []
        drops = False
        for training in (False, True):
            unit.training = training
            boundaries, drops = _prove(unit, hidden, whole_inside, own, ranks)
        for boundary in boundaries:
            if boundary.name in own:
                continue
            inner = proofs.get(boundary.name, [])
            below = [p for p in proofs if p.startswith(f"{boundary.name}.")]
            if len(inner) == 1 and not below:
                merge_collectives(boundary, unit, inner[0], calls[boundary.name])
    except UnitError as error:
        if isinstance(error.__cause__, SequenceError):
            raise error.__cause__ from None
        raise SequenceError(f"it could not be run alone: {error}") from error
    shared = [n for n, _ in module.named_parameters() if not _inside(n, whole_inside)]
    return Block(boundaries, shared, drops)


def _own_layers(proofs: Sequence[Proof]) -> dict[str, bool]:
    """Split layers of the block itself, and whether they are row-parallel.

    Raises:
        SequenceError: when more than these is split.
    """
    found: dict[str, bool] = {}
    for proof in proofs:
        group = proof.group
        more = [*group.parameters, *(name for name, _ in group.arguments), *proof.shared]
        more += [*proof.cuts.outputs, *proof.cuts.uncut, *(n for n, _ in proof.partial_arguments)]
        if proof.summed or more:
            raise SequenceError("the block itself holds split parameters")
        found |= dict.fromkeys(group.columns, False) | dict.fromkeys(group.rows, True)
    return found


def _inside(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _prove(
    unit: Unit, hidden: Key, inside: Sequence[str], own: Mapping[str, bool], ranks: int
) -> tuple[list[Boundary], bool]:
    columns = {n for n, is_row in own.items() if not is_row}
    whole = run_block(unit, inside, columns, None, {}, hidden)
    if not whole.results or whole.results[0].dim() != 3:
        raise SequenceError("its result is not [batch, sequence, hidden]")
    if missing := [n for n in inside if n not in whole.outputs]:
        raise SequenceError(f"{missing[0]} gives no tokens, or is not called")
    length = whole.arguments[hidden].shape[_TOKENS]
    if length < ranks:
        raise SequenceError(
            f"the example has {length} tokens for {ranks} ranks: give example_inputs with more"
        )
    partition = Partition.even(length, ranks)
    _check_decisions(unit, inside, columns, hidden, partition)
    parts = []
    gathered: dict[str, set[Key]] = {}
    for bounds in partition.bounds:
        part = run_block(unit, inside, columns, bounds, whole.trees, hidden)
        if set(part.outputs) != set(whole.outputs):
            raise SequenceError("it calls other modules for a part of the tokens")
        for path, given in part.inputs.items():
            gathered.setdefault(path, set()).update(_compare_given(path, given, whole, bounds))
        if not close(part.results[0], tokens_of(whole.results[0], bounds)):
            raise SequenceError("its result for a token depends on other tokens")
        for mine, other in zip(part.results[1:], whole.results[1:], strict=True):
            if not close(mine, other):
                raise SequenceError("another of its results depends on the tokens")
        parts.append(part)
    if any(shape[1:2] != (length,) or len(shape) != 3 for shape in whole.dropped):
        raise SequenceError("it drops out something other than tokens")
    if whole.other_dropouts:
        name = whole.other_dropouts[0]
        raise SequenceError(f"it drops out by {name}, which does more than multiply")
    for path, is_row in own.items():
        if bool(gathered[path]) == is_row:
            raise SequenceError(f"{path} does not get {'whole' if is_row else 'divided'} sequences")
    _compare_gradients(unit, hidden, inside, columns, whole, parts, partition, gathered)
    boundaries = []
    for path in inside:
        keys = dict.fromkeys(sorted(gathered[path]), path in columns)
        row = "" if own.get(path) else None
        boundaries.append(Boundary(path, keys, row, path not in columns))
    return boundaries, bool(whole.dropped)


def _check_decisions(
    unit: Unit, inside: Sequence[str], columns: set[str], hidden: Key, partition: Partition
) -> None:
    """The block may decide nothing by tokens that a rank does not have."""

    def run(watch: ValueWatch, base: BlockRun | None) -> BlockRun:
        trees = {} if base is None else base.trees
        return run_block(unit, inside, columns, None, trees, hidden, watch, partition)

    def differs(other: BlockRun, base: BlockRun, rank: int) -> str:
        bounds = partition.bounds[rank]
        if not close(tokens_of(other.results[0], bounds), tokens_of(base.results[0], bounds)):
            return "its result for a token"
        return ""

    survey = ValueWatch()
    run(survey, None)
    try:
        if check_memory(unit, lambda watch: run(watch, None)):
            raise SequenceError("it keeps values of tokens, where other code may find them")
        answered = check_decisions(survey, len(partition.bounds), run, differs)
    except DecisionError as error:
        raise SequenceError(str(error)) from None
    for style, whole in answered:
        for bounds in partition.bounds:
            watch = ValueWatch(style)
            part = run_block(unit, inside, columns, bounds, whole.trees, hidden, watch, partition)
            if not close(part.results[0], tokens_of(whole.results[0], bounds)):
                raise SequenceError("a rank's tokens differ where values are compared")


def _compare_given(
    path: str, given: dict[Key, Tensor], whole: BlockRun, bounds: tuple[int, int]
) -> set[Key]:
    """The tensors of which this module gets a part of the tokens; the others are as ever."""
    cut = set()
    for key, x in given.items():
        y = whole.inputs[path].get(key)
        if y is not None and x.shape == y.shape and close(x, y):
            continue
        if (
            y is None
            or y.dim() != 3
            or not x.is_floating_point()
            or not close(x, tokens_of(y, bounds))
        ):
            raise SequenceError(f"{key[0]} of {path} depends on other tokens")
        cut.add(key)
    return cut


def _compare_gradients(
    unit: Unit,
    hidden: Key,
    inside: Sequence[str],
    columns: set[str],
    whole: BlockRun,
    parts: list[BlockRun],
    partition: Partition,
    gathered: Mapping[str, set[Key]],
) -> None:
    parameters = {n: p for n, p in unit.module.named_parameters() if not _inside(n, inside)}
    places = [(path, key) for path in inside for key in sorted(gathered[path])]
    # The row-parallel layers of the block itself, which get whole sequences.
    uncut = [(p, k) for p in inside if columns and not gathered[p] for k in whole.inputs[p]]
    targets = [whole.results[0], *(whole.inputs[path][key] for path, key in (*places, *uncut))]
    drawn = random_like(targets, seed=7)
    cotangents, whole_cotangents = drawn[: 1 + len(places)], drawn[1 + len(places) :]

    def gradients(run: BlockRun, bounds: tuple[int, int] | None) -> dict[Any, Tensor]:
        ends = [run.results[0], *(run.inputs[path][key] for path, key in places)]
        given = [c if bounds is None else tokens_of(c, bounds) for c in cotangents]
        ends += [run.inputs[path][key] for path, key in uncut]
        given += whole_cotangents
        live = [(y, c) for y, c in zip(ends, given, strict=True) if y.requires_grad]
        leaves: dict[Any, Tensor] = {("argument", k): x for k, x in run.arguments.items()}
        leaves |= {("output", path): x for path, x in run.outputs.items()}
        leaves |= {("parameter", n): p for n, p in parameters.items()}
        grads = torch.autograd.grad(
            [y for y, _ in live], [*leaves.values()], [c for _, c in live], allow_unused=True
        )
        return {
            name: torch.zeros_like(x) if g is None else g
            for (name, x), g in zip(leaves.items(), grads, strict=True)
        }

    expected = gradients(whole, None)
    got = [gradients(part, b) for part, b in zip(parts, partition.bounds, strict=True)]
    scale = largest(expected.values())
    for name, grad in expected.items():
        mine = [g[name] for g in got]
        if name[0] == "output" and name[1] in columns:
            right = all(near(g, grad, scale) for g in mine)
        elif name == ("argument", hidden) or name[0] == "output":
            right = all(
                near(g, tokens_of(grad, b), scale)
                for g, b in zip(mine, partition.bounds, strict=True)
            )
        elif name[0] == "parameter":
            right = near(sum_of(mine), grad, scale)
        else:
            right = not grad.any() and not any(g.any() for g in mine)
        if not right:
            what = name[1][0] if name[0] == "argument" else name[1]
            raise SequenceError(f"the gradient of {what} is not made of the tokens' own")
