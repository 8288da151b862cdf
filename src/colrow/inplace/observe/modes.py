"""Modes in which models are run here: exact, in eval mode, without a cache, without dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.verification.reference import full_precision

_ALPHA = frozenset({F.alpha_dropout, F.feature_alpha_dropout})
_DROPOUTS = _ALPHA | {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
_NAMES = ("input", "p", "training")
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class FunctionMode(TorchFunctionMode):
    """Inside it, every function of torch that is called goes through :meth:`call`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """As torch calls it."""
        return self.call(func, args, dict(kwargs or {}))

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What the caller of ``func`` gets."""
        raise NotImplementedError


class _GroupedInDouble(FunctionMode):
    """Inside it, products of groups of rows take fp64, which torch's kernel for them does not."""

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Replaces ``[rows, in]`` times ``[groups, in, out]`` by a product for each group."""
        if (
            getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm")
            and len(args) == 2
            and args[0].dtype == torch.float64
            and (args[0].dim(), args[1].dim()) == (2, 3)
            and kwargs.get("bias") is None
            and kwargs.get("offs") is not None
        ):
            ends = [0, *kwargs["offs"].tolist()]
            rows = [args[0][a:b] @ w for (a, b), w in zip(pairwise(ends), args[1], strict=True)]
            rest = args[0].new_zeros(args[0].shape[0] - ends[-1], args[1].shape[2])
            return torch.cat([*rows, rest])
        return func(*args, **kwargs)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Everything in fp64, as :func:`full_precision`, and grouped matrix products too.

    torch computes those in fp32 and bf16 alone, so here each group is a product of its own.
    """
    with full_precision(), _GroupedInDouble():
        yield


@contextmanager
def arithmetic_of(model: nn.Module) -> Iterator[None]:
    """Arithmetic for a model of this dtype: :func:`exact_arithmetic` for fp64, else torch's own."""
    first = next(model.parameters(), None)
    exact = first is not None and first.dtype == torch.float64
    with exact_arithmetic() if exact else nullcontext():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module; afterwards each is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    if any(mode for _, mode in modes):
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


def configurations(model: nn.Module) -> list[Any]:
    """The configurations that modules of the model hold as ``config``, each listed once."""
    found = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    return list(found.values())


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside it, no configuration in the model asks for a cache of keys and values."""
    asking = [c for c in configurations(model) if vars(c).get("use_cache") is True]
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


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Inside it, torch.nn's transformer layers call their inner layers, as they do in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class Dropout:
    """A call of one of torch's dropouts.

    Attributes:
        function: which.
        input: what it is to drop from.
        p: the share to drop.
        training: whether it is asked to drop at all.
    """

    function: Callable[..., Tensor]
    input: Tensor
    p: float
    training: bool

    @property
    def drops(self) -> bool:
        """Whether it would drop anything."""
        return self.training and self.p != 0

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies with a mask and does nothing else."""
        return self.function not in _ALPHA


def dropout_call(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Dropout | None:
    """The call as a :class:`Dropout`, however its arguments are given; None for other functions.

    ``torch.dropout`` names ``train`` what those of ``torch.nn.functional`` name ``training``; of
    them those with ``alpha`` in their names drop nothing unless told to.
    """
    if func not in _DROPOUTS:
        return None
    named = dict(zip(_NAMES, args, strict=False)) | dict(kwargs or {})
    training = named.get("training", named.get("train", func not in _ALPHA))
    return Dropout(func, named["input"], float(named.get("p", 0.5)), bool(training))


class NoDropout(FunctionMode):
    """Inside it, dropout drops nothing.

    Attributes:
        met: whether any was asked for that would have dropped something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Replaces dropout by the identity, and the dropout of fused attention by none."""
        if (call := dropout_call(func, args, kwargs)) is not None:
            self.met |= call.drops
            return call.input
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        options = dict(zip(_ATTENTION, args, strict=False)) | kwargs
        self.met |= options.get("dropout_p", 0.0) > 0
        return func(**{**options, "dropout_p": 0.0})


class DropoutSpy(FunctionMode):
    """Notes calls of dropout that would drop something; each gives another tensor than its input.

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

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Passes everything on."""
        result = func(*args, **kwargs)
        call = dropout_call(func, args, kwargs)
        if call is None or not call.drops or self.elsewhere:
            return result
        self.seen.append(tuple(result.shape))
        if not call.multiplies:
            self.others.append(func.__name__)
        return result * 1


def drops_out(module: nn.Module, configurations: dict[int, bool]) -> bool:
    """Whether a module, or a configuration that it holds, has a probability of dropout.

    Args:
        configurations: by id, those whose answer is known; new ones are added.
    """
    for inner in module.modules():
        if isinstance(inner, nn.Dropout) and inner.p > 0:
            return True
        for name, value in vars(inner).items():
            if hasattr(value, "to_dict"):
                if id(value) not in configurations:
                    configurations[id(value)] = any(map(_drops, vars(value).items()))
                if configurations[id(value)]:
                    return True
            elif _drops((name, value)):
                return True
    return False


def _drops(item: tuple[str, Any]) -> bool:
    name, value = item
    return isinstance(value, float) and "drop" in name and value > 0
