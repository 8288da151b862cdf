"""Divides tokens over the ranks between the split layers of blocks: hooks, shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.comm import collectives
from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.layers import ColumnSplit, RowSplit, TokenRegion
from colrow.inplace.apply.refusals import refuse_hidden_states
from colrow.inplace.find.sequence import Stack
from colrow.inplace.find.sequence_run import Boundary
from colrow.inplace.observe.calls import Key, ModuleCall, argument_names
from colrow.inplace.observe.modes import FunctionMode, dropout_call
from colrow.layers.shared import sum_rows
from colrow.layers.shared_rows import SharedRows
from colrow.partition import Partition


@dataclass
class EnterBlocks:
    """A forward pre-hook of the first block: takes this rank's tokens. Backward: all-gather."""

    region: TokenRegion
    names: tuple[str, ...]
    hidden: Key

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the block should see them."""
        region = self.region

        def change(key: Key, leaf: Any) -> Any:
            if key != self.hidden:
                return leaf
            length = leaf.shape[-2]
            region.partition, region.inside = None, False
            if length >= region.tp.size:
                region.partition = Partition.even(length, region.tp.size)
                leaf = collectives.scatter_to_sequence(
                    leaf, region.tp, partition=region.partition, layer=region.layer
                )
            return leaf.clone() if leaf._is_view() else leaf

        call = ModuleCall(args, kwargs).mapped(self.names, change, only={self.hidden[0]})
        return call.args, call.kwargs


@dataclass
class LeaveBlocks:
    """A forward hook of the last block: the result of all tokens. Forward: all-gather."""

    region: TokenRegion

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The block's result."""
        region = self.region
        if region.partition is None:
            return output
        whole = _first_changed(
            output,
            lambda x: collectives.gather_from_sequence(
                x,
                region.tp,
                partition=region.partition,
                partial_gradient=False,
                layer=region.layer,
            ),
        )
        region.partition = None
        return whole


@dataclass
class GatherTokens:
    """A forward pre-hook of a module that sees whole sequences. Forward: all-gather.

    Attributes:
        gathered: what is gathered; whether a rank has a part of its gradient.
    """

    region: TokenRegion
    names: tuple[str, ...]
    layer: str
    gathered: dict[Key, bool]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module should see them."""
        region = self.region
        if region.partition is None:
            return args, kwargs
        region.inside = True

        def change(key: Key, leaf: Any) -> Any:
            if key not in self.gathered:
                return leaf
            return collectives.gather_from_sequence(
                leaf,
                region.tp,
                partition=region.partition,
                partial_gradient=self.gathered[key],
                layer=self.layer,
            )

        wanted = {name for name, _ in self.gathered}
        call = ModuleCall(args, kwargs).mapped(self.names, change, only=wanted)
        return call.args, call.kwargs


@dataclass
class DivideTokens:
    """A forward hook of such a module: this rank's tokens of its result. Backward: all-gather.

    Attributes:
        divided: whether the result has this rank's tokens already.
    """

    region: TokenRegion
    layer: str
    divided: bool

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The module's result."""
        region = self.region
        region.inside = False
        if region.partition is None or self.divided:
            return output
        return _first_changed(
            output,
            lambda x: collectives.scatter_to_sequence(
                x, region.tp, partition=region.partition, layer=self.layer
            ),
        )


def _first_changed(output: Any, change: Any) -> Any:
    leaves, spec = pytree.tree_flatten(output)
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            changed = change(leaf)
            # What a custom function gives as a view may not be written into.
            leaves[number] = changed.clone() if changed._is_view() else changed
            break
    return pytree.tree_unflatten(leaves, spec)


class TokensMixin(nn.Module):
    """A module whose parameters every rank uses for its own tokens. Backward: all-reduce."""

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        tokens: tuple[TokenRegion, str, frozenset[str]] | None = self.__dict__.get("colrow_tokens")
        if tokens is None or value is None or name not in tokens[2]:
            return value
        region, layer, _ = tokens
        if region.partition is None:
            return value
        return sum_rows(value, region.tp, SharedRows.whole(value.shape[0]), 0, layer)


class DropoutMixin(nn.Module):
    """A block that drops out tokens between its split layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own; masks are this rank's part of those of whole sequences."""
        region: TokenRegion = self.__dict__["colrow_region"]
        if not self.training or region.partition is None:
            return super().forward(*args, **kwargs)
        with _DropoutOfTokens(region):
            return super().forward(*args, **kwargs)


class _DropoutOfTokens(FunctionMode):
    """Inside it, all ranks draw one mask for whole sequences, and each takes its tokens of it."""

    def __init__(self, region: TokenRegion) -> None:
        super().__init__()
        self.region = region

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Replaces dropout outside the modules that see whole sequences."""
        call, partition = dropout_call(func, args, kwargs), self.region.partition
        if call is None or partition is None or self.region.inside:
            return func(*args, **kwargs)
        if not call.drops:
            return call.input
        if not call.multiplies:
            raise ValueError(
                f"{call.function.__name__} in a block whose tokens are divided: its masks are not "
                "those of whole sequences; use plain dropout, or sequence_parallel=False"
            )
        x = call.input
        start, stop = partition.bounds[self.region.tp.rank]
        whole = x.new_ones(*x.shape[:-2], partition.length, x.shape[-1])
        return x * call.function(whole, call.p, True)[..., start:stop, :]


def refuse_recomputation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a block.

    Raises:
        ValueError: when the block will be run again in backward, where the blocks around it, which
            divide its tokens, are not.
    """
    again = getattr(module, "gradient_checkpointing", False)
    if again and module.training and torch.is_grad_enabled():
        raise ValueError(
            "gradient checkpointing of a model that was split with sequence_parallel: leave one of "
            "the two out"
        )


def split_stacks(applier: Applier, stacks: list[Stack]) -> None:
    """Divides the tokens between the split layers of these blocks."""
    model = applier.model
    for stack in stacks:
        region = TokenRegion(applier.tp, stack.names[0].rpartition(".")[0])
        first, last = model.get_submodule(stack.names[0]), model.get_submodule(stack.names[-1])
        enter = EnterBlocks(region, argument_names(first), stack.hidden)
        for name, block in zip(stack.names, stack.blocks, strict=True):
            module = model.get_submodule(name)
            applier.hook(module.register_forward_pre_hook(refuse_recomputation, with_kwargs=True))
            _share(applier, name, block.shared, region)
            if block.drops:
                block_module = model.get_submodule(name)
                applier.attach(block_module, "colrow_region", region)
                applier.change_class(block_module, DropoutMixin)
            for boundary in block.boundaries:
                _bound(applier, f"{name}.{boundary.name}", boundary, region)
        applier.hook(first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        applier.hook(last.register_forward_hook(LeaveBlocks(region)))
    if stacks:
        applier.hook(model.register_forward_pre_hook(refuse_hidden_states, with_kwargs=True))


def _bound(applier: Applier, path: str, boundary: Boundary, region: TokenRegion) -> None:
    inner = applier.model.get_submodule(path)
    names, gathered = argument_names(inner), boundary.gathered
    if not boundary.cut:  # a column-parallel layer, whose argument has another name now
        gathered = {(names[0], 0): True}
    if gathered:
        whole = GatherTokens(region, names, path, gathered)
        applier.hook(inner.register_forward_pre_hook(whole, with_kwargs=True, prepend=True))
    if any(gathered.values()):
        for module in inner.modules():
            if isinstance(how := module.__dict__.get("colrow"), ColumnSplit):
                how.region = region
    if boundary.row is not None:
        row: RowSplit = inner.get_submodule(boundary.row).__dict__["colrow"]
        row.region = region
    if boundary.cut:
        applier.hook(
            inner.register_forward_hook(DivideTokens(region, path, boundary.row is not None))
        )


def _share(applier: Applier, block: str, parameters: list[str], region: TokenRegion) -> None:
    by_owner: dict[str, set[str]] = {}
    for path in parameters:
        owner, _, last = f"{block}.{path}".rpartition(".")
        by_owner.setdefault(owner, set()).add(last)
    for owner, names in by_owner.items():
        target = applier.model.get_submodule(owner)
        applier.attach(target, "colrow_tokens", (region, owner, frozenset(names)))
        applier.change_class(target, TokensMixin)
