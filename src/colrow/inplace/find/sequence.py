"""Sequence parallelism: finds stacks of blocks in which every rank may have a part of the tokens.

Between the split layers of a block there are norms, residuals and the like. What they compute for
a token depends on that token alone, if it does: then each rank may have some of the tokens there.
The modules inside a block that hold the split layers (its attention, its MLP) still see whole
sequences: what they are given is gathered, what they give is divided again (Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", 2022, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from colrow.inplace.find.infer import Inference
from colrow.inplace.find.model_code import Divided, watched_between
from colrow.inplace.find.proof import Proof
from colrow.inplace.find.sequence_proof import Block, prove_block
from colrow.inplace.find.sequence_run import SequenceError
from colrow.inplace.find.whole_results import GatheredLayers
from colrow.inplace.observe.calls import Key, ModuleCall, argument_names, kind_of, tensors_of
from colrow.inplace.observe.modes import run_example
from colrow.inplace.observe.watch import ValueWatch


@dataclass
class Stack:
    """Blocks that hand tokens to one another.

    Attributes:
        names: the blocks', in the order in which they are called.
        hidden: the argument that holds the tokens.
        blocks: what was proven of each.
    """

    names: list[str]
    hidden: Key
    blocks: list[Block] = field(default_factory=list)


@dataclass
class _Seen:
    """A call of a block: the tensors that it was given, and the first that it gave."""

    name: str
    given: dict[Key, Tensor]
    result: Tensor | None = None


def find_stacks(
    model: nn.Module,
    batch: Mapping[str, Any],
    calls: Mapping[str, ModuleCall],
    inference: Inference,
    gathered: GatheredLayers,
    ranks: int,
) -> list[Stack]:
    """Every stack of blocks with split layers in it, each block proven.

    Raises:
        ValueError: when there is none, or one that cannot be divided by tokens, saying why.
    """
    groups = _lists_of_blocks(model, inference)
    if not groups:
        raise ValueError(
            f"sequence_parallel: {type(model).__name__} has no stack of blocks with split layers"
        )
    watch = ValueWatch()
    # What the last block gives is gathered.
    divided: dict[str, Divided] = {n: lambda y: tensors_of(y)[:1] for g in groups for n in g[:-1]}
    divided |= {names[-1]: lambda _: [] for names in groups}
    with watched_between(model, watch, divided):
        seen = _watch(model, batch, {*divided})
    if reason := watch.problem or watch.decided:
        raise ValueError(
            f"sequence_parallel: the tokens of {groups[0][0]} and its like cannot be divided: "
            f"between them the model's own code: {reason}"
        )
    known: dict[Any, Block] = {}
    stacks = []
    for names in groups:
        try:
            stack = Stack(names, _hidden(model, names, seen))
            for name in names:
                kind = kind_of(model.get_submodule(name), calls.get(name))
                if kind not in known:
                    known[kind] = _block(
                        name, model, calls, inference, gathered, stack.hidden, ranks
                    )
                stack.blocks.append(known[kind])
        except SequenceError as error:
            raise ValueError(
                f"sequence_parallel: {names[0]} and its like cannot be divided by tokens: {error}"
            ) from None
        stacks.append(stack)
    return stacks


def _lists_of_blocks(model: nn.Module, inference: Inference) -> list[list[str]]:
    """The outermost lists of modules in which layers are split."""
    found: list[list[str]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(
            path.startswith(f"{name}.") for names in found for name in names
        ):
            continue
        names = [f"{path}.{i}" for i in range(len(module))]
        if any(f"{p}.".startswith(f"{name}.") for name in names for p in inference.proofs):
            found.append(names)
    return found


def _watch(model: nn.Module, batch: Mapping[str, Any], wanted: set[str]) -> list[_Seen]:
    """One forward pass; the calls of these modules in their order."""
    order: list[_Seen] = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = ModuleCall(args, kwargs).tensors(argument_names(module))
            floating = {key: x for key, x in given.items() if x.is_floating_point()}
            order.append(_Seen(name, floating))

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        results = tensors_of(output)
        order[-1].result = results[0] if results else None

    with ExitStack() as hooks:
        for name in wanted:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        run_example(model, batch)
    return order


def _hidden(model: nn.Module, names: list[str], order: Sequence[_Seen]) -> Key:
    """The argument through which each block gets what the block before it gave."""
    mine = [seen for seen in order if seen.name in names]
    if [seen.name for seen in mine] != names:
        raise SequenceError("they are not called once each, one after the other")
    if len(mine) == 1:
        keys = [key for key, x in mine[0].given.items() if x.dim() == 3]
        if not keys:
            raise SequenceError("they are given no [batch, sequence, hidden]")
        return keys[0]
    keys_of_all = []
    for last, seen in pairwise(mine):
        keys = [key for key, x in seen.given.items() if x is last.result]
        if not keys:
            raise SequenceError(f"{seen.name} is not given just what {last.name} gave")
        keys_of_all.append(keys[0])
    if len(set(keys_of_all)) > 1:
        raise SequenceError("they are called in different ways")
    key = keys_of_all[0]
    if any(key not in seen.given or seen.given[key].dim() != 3 for seen in mine):
        raise SequenceError(f"{key[0]} is not [batch, sequence, hidden]")
    return key


def _block(
    name: str,
    model: nn.Module,
    calls: Mapping[str, ModuleCall],
    inference: Inference,
    gathered: GatheredLayers,
    hidden: Key,
    ranks: int,
) -> Block:
    prefix = f"{name}."
    proofs: dict[str, list[Proof]] = {}
    for path, found in inference.proofs.items():
        if f"{path}.".startswith(prefix):
            if path not in calls:
                raise SequenceError(f"{path} was not called")
            proofs["" if path == name else path.removeprefix(prefix)] = found
    if not proofs:
        raise SequenceError(f"no layer of {name} is split")
    module = model.get_submodule(name)
    inner = [p for p in proofs if p]
    outermost = [p for p in inner if not any(p.startswith(f"{other}.") for other in inner)]
    inner_calls = {p: calls[prefix + p] for p in inner}
    others = {n.removeprefix(prefix) for n in (*gathered.linears, *gathered.tables)}
    reason = ""
    for whole in (outermost, sorted({p.partition(".")[0] for p in outermost})):
        outside = [n for n in others if n in dict(module.named_modules())]
        outside = [n for n in outside if not any(f"{n}.".startswith(f"{p}.") for p in whole)]
        if outside:
            reason = f"{outside[0]} is split by its output features"
            continue
        try:
            return prove_block(name, module, calls[name], hidden, whole, proofs, inner_calls, ranks)
        except SequenceError as error:
            reason = str(error)
    raise SequenceError(reason)
