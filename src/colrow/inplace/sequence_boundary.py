"""The collectives at a module that sees whole sequences, and which of its layers they replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from colrow.inplace.calls import Key, ModuleCall, tensors_of
from colrow.inplace.dropout import dropout_call
from colrow.inplace.prove import Proof
from colrow.inplace.simulate import Simulation
from colrow.inplace.unit import Unit


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


def shorten(boundary: Boundary, block: Unit, proof: Proof, call: ModuleCall) -> None:
    """Where the collectives of a boundary may take the place of those of the layers inside."""
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

    def root(*args: Any, **kwargs: Any) -> Any:
        with spy:
            return type(unit.module).forward(unit.module, *args, **kwargs)

    tables = [name for name in group.columns if name not in unit.factors]
    if tables:
        return
    forwards = {name: column(name) for name in group.columns}
    forwards |= {name: row(name) for name in group.rows} | {"": root}
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


class DropoutSpy(TorchFunctionMode):
    """Notes dropout that would drop something; results of it are other tensors than its input.

    Attributes:
        seen: shapes of what is dropped out.
        others: names of dropouts that do more than multiply with a mask.
        elsewhere: whether nothing is noted now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.others: list[str] = []
        self.elsewhere = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Passes everything on."""
        result = func(*args, **(kwargs or {}))
        call = dropout_call(func, args, kwargs)
        if call is None or not call.drops or self.elsewhere:
            return result
        self.seen.append(tuple(result.shape))
        if not call.multiplies:
            self.others.append(func.__name__)
        return result * 1
