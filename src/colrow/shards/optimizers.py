"""Which optimisers are right on parameters that are divided over ranks."""

from __future__ import annotations

import inspect
import re
import warnings
import weakref

import torch
from torch import nn

from colrow.shards.boxes import placements, tensor_parallel_group, unwrap

# Each element of a parameter moves by its own gradients alone, so that a shard moves as it would in
# the whole tensor; each was compared with the whole model in fp64.
ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.ASGD,
)
_INSTEAD = "an elementwise one such as torch.optim.AdamW, or colrow.Muon or colrow.Adafactor"
# By what their classes are called, in any library: what they do with a whole tensor, and what to
# take in their place.
_WHOLE: tuple[tuple[str, str, str], ...] = (
    (".*muon.*|dion", "makes whole matrices orthogonal", "colrow.Muon(matrices, model, ...)"),
    (
        ".*adafactor.*|came|adalomo",
        "takes means along whole rows and columns",
        "colrow.Adafactor(parameters, model, ...)",
    ),
    (".*(lamb|lars|larc)|lars.*|novograd", "takes norms of whole tensors", _INSTEAD),
    ("sm3|adammini.*", "takes maxima or means along whole dimensions", _INSTEAD),
    (
        ".*(shampoo|soap|psgd|kron)|e?kfac.*|(q|ld)?(galore|apollo).*",
        "takes products of whole matrices",
        _INSTEAD,
    ),
    ("prodigy.*|dadapt.*", "takes a step size from sums over all parameters", _INSTEAD),
    ("g?sam|asam", "takes a step along the norm of all gradients", _INSTEAD),
    ("lbfgs", "takes products of vectors of all parameters", _INSTEAD),
    (
        ".*((8|4)bit|fp8).*",
        "quantises its state in blocks of the shard",
        "torch.optim.AdamW, or colrow.Adafactor(parameters, model, ...) for less memory",
    ),
)
_PREFIXES = "(distributed|dist|fused|foreach|paged|scaled|single|multi|torch|cpu|scheduled?free)?"
_checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class RightOnShards:
    """An optimiser that looks at whole tensors by itself, however they are divided.

    Attributes:
        whole_state: names of the states that every rank holds whole.
    """

    whole_state: frozenset[str] = frozenset()


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuses an optimiser that would compute something else on shards than on whole tensors.

    Elementwise optimisers of torch (:data:`ELEMENTWISE`), :class:`colrow.Muon` and
    :class:`colrow.Adafactor` are right on shards, and so is any optimiser of parameters that no
    rank divides. :class:`colrow.TrainingCheckpoints` and :class:`colrow.GradScaler` call this.

    Args:
        optimizer: also one that another library has wrapped.
        model: whose parameters it has, wrapped by DDP or FSDP2 or not.

    Raises:
        ValueError: an optimiser that is known to look at whole tensors; says what to take instead.

    Warns:
        UserWarning: once for each optimiser whose class is not known, with what to look at.
    """
    if _has_shards(optimizer, model):
        refuse_on_shards(optimizer)


def refuse_on_shards(optimizer: torch.optim.Optimizer) -> None:
    """As :func:`check_optimizer`, for an optimiser that is known to hold a shard."""
    inner = _unwrapped(optimizer)
    kind = type(inner)
    if isinstance(inner, RightOnShards) or _is_elementwise(kind):
        return
    names = [base.__name__ for base in kind.__mro__]
    for pattern, does, instead in _WHOLE:
        if any(re.fullmatch(_PREFIXES + f"({pattern})", _plain(name)) for name in names):
            raise ValueError(
                f"{kind.__name__} {does}, but this rank's parameters are shards of tensors, of "
                f"which it would compute something else: use {instead}"
            )
    if inner not in _checked:
        _checked.add(inner)
        warnings.warn(
            f"colrow does not know the optimiser {kind.__name__}. On shards it is right if each "
            "element moves by its own gradients alone; if it takes norms, means or products of "
            "whole tensors or of all parameters, every rank computes something else: compare a few "
            f"steps with --tp 1, or use {_INSTEAD}",
            stacklevel=2,
        )


def whole_states(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """Names of the states that every rank holds whole."""
    return optimizer.whole_state if isinstance(optimizer, RightOnShards) else frozenset()


def _has_shards(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether it has a parameter that is divided over tp."""
    module = unwrap(model)
    if tensor_parallel_group(module).size == 1:
        return False
    places = placements(module)
    divided = {id(p) for n, p in module.named_parameters() if places[n].spec.dim is not None}
    return any(id(p) in divided for group in optimizer.param_groups for p in group["params"])


def _is_elementwise(kind: type[torch.optim.Optimizer]) -> bool:
    """One of the list, or a class derived from one that takes the same steps."""
    for known in ELEMENTWISE:
        if issubclass(kind, known):
            return inspect.unwrap(kind.step) is inspect.unwrap(known.step)
    return False


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's wrapper."""
    if type(optimizer).__name__ == "AcceleratedOptimizer":
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            return inner
    return optimizer


def _plain(name: str) -> str:
    return name.lower().replace("_", "")
