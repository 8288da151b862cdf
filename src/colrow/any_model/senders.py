"""What each module of a split model sends, asked of the split's record as a pass goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call, Phase
from colrow.inplace.apply.gradients import ColumnEntry, SumOutputGradient
from colrow.inplace.apply.layers import (
    ColumnSplit,
    GatheredSplit,
    HeadMixin,
    RowSplit,
    VocabularySplit,
)
from colrow.inplace.apply.modules import ArgumentHook, SumResults
from colrow.inplace.apply.sequence import DivideTokens, EnterBlocks, GatherTokens, LeaveBlocks
from colrow.inplace.observe.calls import ModuleCall, argument_names
from colrow.layers.shared_rows import SharedRows
from colrow.partition import Partition

_SPLIT_LAYERS = (ColumnSplit, RowSplit, VocabularySplit, GatheredSplit)
_HOOKS = (
    ArgumentHook,
    SumOutputGradient,
    SumResults,
    EnterBlocks,
    LeaveBlocks,
    GatherTokens,
    DivideTokens,
)


class UnknownError(Exception):
    """Why the calls cannot be known."""


class Watcher:
    """Asks the record what each module sends while a forward pass goes through it."""

    def __init__(self, tp: ParallelGroup) -> None:
        self.tp = tp
        self.calls: list[Call] = []
        self._entered: dict[int, tuple[Tensor, int, set[int]]] = {}  # by entry

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks before and after everything else that is hooked there."""
        undo: list[Callable[[], object]] = []
        try:
            for name, module in model.named_modules():
                self._check_known(name, module)
                undo += [
                    module.register_forward_pre_hook(
                        self._before, with_kwargs=True, prepend=True
                    ).remove,
                    module.register_forward_hook(self._after, prepend=True).remove,
                ]
                undo += self._count_reads(module)
            yield
        finally:
            for step in undo:
                step()

    def _check_known(self, name: str, module: nn.Module) -> None:
        state = module.__dict__
        how = state.get("colrow")
        known = how is None or isinstance(how, _SPLIT_LAYERS)
        if not known or "colrow_adapted" in state or (isinstance(how, ColumnSplit) and how.others):
            raise UnknownError(f"{name} has adapters, or is split in a way that is not foretold")
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            own = type(hook).__module__.startswith("colrow.")
            if own and not isinstance(hook, _HOOKS):
                raise UnknownError(
                    f"{name} has a hook ({type(hook).__name__}) that is not foretold"
                )

    def _add(self, op: str, phase: Phase, layer: str, elements: int, like: Tensor) -> None:
        dtype = str(like.dtype).removeprefix("torch.")
        size = elements * like.element_size()
        self.calls.append(Call(op, phase, layer, size, dtype, self.tp.name))

    def _summed(self, layer: str, x: Tensor) -> None:
        """An all-reduce of the gradient, if it has one."""
        if x.requires_grad:
            self._add("all_reduce", "backward", layer, x.numel(), x)

    def _enter(self, entry: ColumnEntry, x: Tensor, user: object) -> None:
        """One all-reduce for all layers that get the same tensor through one entry."""
        if not x.requires_grad:
            return
        last = self._entered.get(id(entry))
        if last is not None and last[0] is x and last[1] == x._version and id(user) not in last[2]:
            last[2].add(id(user))
            return
        self._entered[id(entry)] = x, x._version, {id(user)}
        self._summed(entry.layer, x)

    def _rows(self, how: ColumnSplit, parameter: Any, dim: int) -> None:
        """Gradients of output features that several ranks hold."""
        self._shared(how.layer, parameter, how.shared, dim)

    def _shared(self, layer: str, parameter: Any, rows: SharedRows, dim: int) -> None:
        if parameter is not None and parameter.requires_grad and rows.total:
            others = parameter.numel() // parameter.shape[dim]
            self._add("all_reduce", "backward", layer, rows.total * others, parameter)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        how: Any = module.__dict__.get("colrow")
        x: Any = args[0] if args else kwargs.get("input")
        if isinstance(how, ColumnSplit):
            self._rows(how, module.weight, int(how.transposed))
            self._rows(how, module.bias, 0)
            divided = how.region is not None and how.region.partition is not None
            if how.entry is not None and not divided:
                if how.alone:
                    self._summed(how.layer, x)
                else:
                    self._enter(how.entry, x, module)
        elif isinstance(how, RowSplit):
            self._row(how, module, x)
        elif isinstance(how, GatheredSplit) or (
            isinstance(how, VocabularySplit) and isinstance(module, HeadMixin)
        ):
            self._summed(how.layer, x)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, ArgumentHook | EnterBlocks | GatherTokens):
                self._arguments(hook, module, args, kwargs)

    def _row(self, how: RowSplit, module: Any, x: Tensor) -> None:
        out = module.weight.shape[int(how.transposed)]
        tokens = how.region.partition if how.region is not None else None
        rows = x.numel() // x.shape[-1]
        if tokens is None:
            self._add("all_reduce", "forward", how.layer, rows * out, x)
            return
        padded = rows // tokens.length * _padded(tokens) * out
        self._add("reduce_scatter", "forward", how.layer, padded, x)
        self._add("all_gather", "backward", how.layer, padded, x)
        if module.bias is not None:
            whole = SharedRows.whole(module.bias.shape[0])
            self._shared(how.layer, module.bias, whole, 0)

    def _arguments(
        self,
        hook: ArgumentHook | EnterBlocks | GatherTokens,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        def sends(key: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if isinstance(hook, ArgumentHook):
                taken = hook.taken.get(key)
                fits = taken is not None and (
                    leaf.dim() > taken[0] and leaf.shape[taken[0]] % taken[1] == 0
                )
                if fits or (taken is None and key in hook.summed):
                    self._summed(hook.layer, leaf)
            elif isinstance(hook, EnterBlocks):
                if key == hook.hidden and leaf.shape[-2] >= self.tp.size and leaf.requires_grad:
                    tokens = Partition.even(leaf.shape[-2], self.tp.size)
                    size = leaf.numel() // leaf.shape[-2] * _padded(tokens)
                    self._add("all_gather", "backward", hook.region.layer, size, leaf)
            elif key in hook.gathered and hook.region.partition is not None:
                size = self._gathered(hook.layer, leaf, hook.region.partition)
                if hook.gathered[key] and leaf.requires_grad:
                    self._add("reduce_scatter", "backward", hook.layer, size, leaf)
            return leaf

        ModuleCall(args, kwargs).mapped(argument_names(module), sends)

    def _gathered(self, layer: str, local: Tensor, tokens: Partition) -> int:
        """An all-gather of this rank's tokens; its elements."""
        size = local.numel() // local.shape[-2] * _padded(tokens)
        self._add("all_gather", "forward", layer, size, local)
        return size

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        how: Any = module.__dict__.get("colrow")
        if isinstance(how, VocabularySplit) and not isinstance(module, HeadMixin):
            self._add("all_reduce", "forward", how.layer, output.numel(), output)
        elif isinstance(how, GatheredSplit) or (isinstance(how, VocabularySplit) and not how.local):
            rows = output.numel() // output.shape[-1]
            self._add("all_gather", "forward", how.layer, rows * _padded(how.partition), output)
        floats = [
            x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        for hook in module._forward_hooks.values():
            if isinstance(hook, SumOutputGradient):
                self._enter(hook.entry, output, hook)
            elif isinstance(hook, SumResults):
                for x in floats:
                    self._add("all_reduce", "forward", hook.layer, x.numel(), x)
            elif (
                isinstance(hook, LeaveBlocks | DivideTokens)
                and hook.region.partition is not None
                and floats
            ):
                tokens, x = hook.region.partition, floats[0]
                if isinstance(hook, LeaveBlocks):
                    self._gathered(hook.region.layer, x, tokens)
                elif not hook.divided and x.requires_grad:
                    size = x.numel() // x.shape[-2] * _padded(tokens)
                    self._add("all_gather", "backward", hook.layer, size, x)

    def _count_reads(self, module: nn.Module) -> list[Callable[[], object]]:
        """Notes when the module's code reads a parameter that is summed or gathered."""
        state: dict[str, Any] = module.__dict__
        undo: list[Callable[[], object]] = []

        def swap(key: str, value: Any) -> None:
            before = state[key]
            state[key] = value
            undo.append(lambda: state.__setitem__(key, before))

        if shared := state.get("colrow_shared"):

            def summed(name: str) -> None:
                parameter: Any = module._parameters[name]
                whole = SharedRows.whole(parameter.shape[0])
                self._shared(shared[name].layer, parameter, whole, 0)

            swap("colrow_shared", _Reads(shared, summed))
        if spread := state.get("colrow_spread"):

            def gathered(name: str) -> None:
                if name in state.get("colrow_whole", ()):
                    return
                how, shard = spread[name], module._parameters[name]
                assert shard is not None
                others = shard.numel() // shard.shape[how.dim]
                size = others * _padded(how.partition)
                self._add("all_gather", "forward", how.layer, size, shard)

            swap("colrow_spread", _Reads(spread, gathered))
        if tokens := state.get("colrow_tokens"):
            region, layer, names = tokens

            def of_tokens(name: str) -> None:
                parameter: Any = module._parameters.get(name)
                if region.partition is not None and parameter is not None:
                    whole = SharedRows.whole(parameter.shape[0])
                    self._shared(layer, parameter, whole, 0)

            swap("colrow_tokens", (region, layer, _Asked(names, of_tokens)))
        return undo


def _padded(partition: Partition) -> int:
    """The indices of all ranks, each with as many as the largest."""
    return partition.largest * partition.parts


class _Reads(dict[str, Any]):
    """A dictionary that tells what is taken from it."""

    def __init__(self, values: dict[str, Any], note: Callable[[str], None]) -> None:
        super().__init__(values)
        self._note = note

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)


class _Asked:
    """A set that tells which of its members are asked for."""

    def __init__(self, names: frozenset[str], note: Callable[[str], None]) -> None:
        self._names, self._note = names, note

    def __contains__(self, name: str) -> bool:
        found = name in self._names
        if found:
            self._note(name)
        return found
