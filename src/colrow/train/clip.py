"""The norm of all gradients, and clipping by it, when parameters are divided or held twice."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from colrow.comm import primitives
from colrow.comm.agreement import assert_on_device
from colrow.comm.compat import local_tensor
from colrow.comm.group import ParallelGroup
from colrow.models.decoder import Decoder
from colrow.shards.boxes import (
    data_parallel_group,
    placements,
    tensor_parallel_group,
    unwrap,
)
from colrow.shards.same import HeldTensor, owner_of, problem_of

_ROUNDING = 1e-2  # of squared norms of gradients, as they differ in bf16 on a GPU


@torch.no_grad()
def grad_norm(module: nn.Module) -> Tensor:
    """The 2-norm of the gradients of the whole model, the same on every rank.

    Each element counts once: those that several tp ranks hold (norms, biases, shared KV heads) for
    one of them, those that FSDP2 divides for the rank that holds them. DDP's replicas have equal
    gradients, so nothing is sent between them.

    Args:
        module: whose parameters have gradients, wrapped by DDP or FSDP2 or not. Parameters without
            one are left out. In a pipeline a tied embedding counts on the first stage.

    Returns:
        A number in fp64 on the parameters' device; infinite or nan when a gradient is.

    Raises:
        ValueError: parameters of which nothing says how they are divided, such as those of torch's
            own layers beside colrow's, have different gradients on the tp ranks.

    Communicates: one all-reduce over tp, of 8 bytes, and 8 more for each rank where there are such
    parameters; under FSDP2 one over dp, and in a pipeline one over pp.
    """
    module = unwrap(module)
    places = placements(module)
    device = next(module.parameters()).device
    norms: list[Tensor] = []
    tp = tensor_parallel_group(module)
    unknown: dict[str, Tensor] = {}
    copies, pp = _copies_of_others(module)
    dp = data_parallel_group(module)
    for name, parameter in module.named_parameters():
        if parameter.grad is None or id(parameter) in copies:
            continue
        if places[name].rows is None and dp.rank > 0:
            continue  # one of several dp ranks counts what FSDP2 left whole
        grad = local_tensor(parameter.grad)
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        for box in places[name].owned:
            norms.append(torch.linalg.vector_norm(box.view(grad), dtype=wide).double())
        if not places[name].declared:
            unknown[name] = grad
    total = torch.zeros((), dtype=torch.float64, device=device)
    if norms:
        total = torch.stack(norms).square().sum()
    if tp.size > 1 and not all(place.declared for place in places.values()):
        total = _with_equal(module, total, unknown, tp)
    else:
        total = primitives.all_reduce(total, tp, layer="grad_norm", phase="backward")
    for group in (dp, pp):
        total = primitives.all_reduce(total, group, layer="grad_norm", phase="backward")
    return total.sqrt()


def _with_equal(
    module: nn.Module, total: Tensor, unknown: dict[str, Tensor], tp: ParallelGroup
) -> Tensor:
    """The sum of ``total`` over tp, if what nothing says is divided has gradients of equal norms.

    Args:
        unknown: these gradients.

    Raises:
        ValueError: the norms differ, so that they are no gradients of whole parameters.
    """
    mine = total.new_zeros(1 + tp.size)
    mine[0] = total
    for grad in unknown.values():
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        mine[1 + tp.rank] += torch.linalg.vector_norm(grad, dtype=wide).double().square()
    sums = primitives.all_reduce(mine, tp, layer="grad_norm", phase="backward")
    top, low = sums[1:].max(), sums[1:].min()
    equal = ~(top - low > _ROUNDING * top)  # nan counts as equal: it is told elsewhere
    if sums.is_cuda:
        message = f"gradients of {', '.join(unknown)} differ between the {tp.name} ranks: say how"
        assert_on_device(equal, f"{message} they are divided, as with weight_spec")
    elif not equal:
        held = (HeldTensor(n, grad, False, owner_of(module, n)) for n, grad in unknown.items())
        raise ValueError(f"gradients: {problem_of(held, tp, rounds=True) or 'they differ'}")
    return sums[0]


def _copies_of_others(module: nn.Module) -> tuple[set[int], ParallelGroup]:
    """Parameters that another stage counts, by id, and the group of the pipeline's ranks."""
    for child in module.modules():
        if isinstance(child, Decoder):
            tied = child.config.tie_embeddings and child.embedding is not None
            first = any(stage.is_first for stage in child.stages)
            copy = child.embedding if tied and not first else None
            return set() if copy is None else {id(copy.weight)}, child.pipeline.pp
    return set(), ParallelGroup.single("pp")


@torch.no_grad()
def clip_grad_norm_(
    module: nn.Module, max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales all gradients so that their :func:`grad_norm` is at most ``max_norm``.

    As :func:`torch.nn.utils.clip_grad_norm_`, for a module whose parameters are divided.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: ``max_norm`` is not positive.
        RuntimeError: with ``error_if_nonfinite``, when a gradient is infinite or nan.

    Communicates: as :func:`grad_norm`.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: must be above 0")
    norm = grad_norm(module)
    if error_if_nonfinite and not math.isfinite(norm.item()):
        raise RuntimeError(f"the norm of the gradients is {norm.item()}")
    scale_grads_(module.parameters(), torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def scale_grads_(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies every gradient by a number, in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            grad = local_tensor(parameter.grad)
            grad.mul_(factor.to(grad.dtype))
