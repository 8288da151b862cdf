"""One forward pass of the model, and what each of its modules was called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from colrow.inplace.calls import ModuleCall, private, tensors_of
from colrow.verification.reference import FullPrecision


class _GroupedInDouble(TorchFunctionMode):
    """Inside it, products of groups of rows take fp64, which torch's kernel for them does not."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replaces ``[rows, in]`` times ``[groups, in, out]`` by a product for each group."""
        options = dict(kwargs or {})
        if (
            getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm")
            and len(args) == 2
            and args[0].dtype == torch.float64
            and (args[0].dim(), args[1].dim()) == (2, 3)
            and options.get("bias") is None
            and options.get("offs") is not None
        ):
            ends = [0, *options["offs"].tolist()]
            rows = [args[0][a:b] @ w for (a, b), w in zip(pairwise(ends), args[1], strict=True)]
            rest = args[0].new_zeros(args[0].shape[0] - ends[-1], args[1].shape[2])
            return torch.cat([*rows, rest])
        return func(*args, **options)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Where torch is asked for fp32, and where it is not asked at all, it gives fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with FullPrecision(), _GroupedInDouble():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def arithmetic_of(model: nn.Module) -> Iterator[None]:
    """The mode in which a model of this dtype runs: exact for fp64."""
    first = next(model.parameters(), None)
    exact = first is not None and first.dtype == torch.float64
    with exact_arithmetic() if exact else nullcontext():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, each as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    if any(mode for _, mode in modes):
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Configurations that ask for a cache do not, for a while."""
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    asking = [c for c in configs.values() if vars(c).get("use_cache") is True]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


def run_example(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's result for these keyword arguments, in eval mode and without a cache."""
    with evaluating(model), arithmetic_of(model), without_cache(model):
        return model(**inputs)


def capture_calls(
    model: nn.Module, batches: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, ModuleCall], list[Tensor]]:
    """The first call of every module inside ``model`` during forward passes, by name.

    Calls with nested tensors are left out.

    Batches after the first may be ones that the model does not take.

    Returns:
        The calls, and the floating-point results for the first batch.
    """
    calls: dict[str, ModuleCall] = {}
    results: list[Tensor] = []

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls and not any(map(_is_nested, pytree.tree_leaves((args, kwargs)))):
                calls[name] = ModuleCall(args, kwargs).mapped((), lambda _, leaf: _copied(leaf))

        return keep

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None
    ]
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                try:
                    result = run_example(model, batch)
                except Exception:  # whatever the model's code raises
                    if number == 0:
                        raise
                    continue
                if number == 0:
                    results = [y.detach().clone() for y in tensors_of(result)]
    finally:
        for handle in handles:
            handle.remove()
    return calls, results


def _is_nested(leaf: Any) -> bool:
    """Whether it is a tensor of rows of different lengths, with which nothing is tried."""
    return isinstance(leaf, Tensor) and leaf.is_nested


def _copied(leaf: Any) -> Any:
    """The leaf as it is now: the model may go on to change it, as it does a cache."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else private(leaf)
