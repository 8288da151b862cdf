"""Any architecture, split in place on the ranks of a group, against the whole model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.any_model.loading import load_model
from colrow.checkpoint.assemble import full_grads
from colrow.comm.mesh import Mesh, init_mesh
from colrow.inplace.api import parallelize
from colrow.tiny_models.architectures import Architecture, build, without_dropout
from colrow.verification.comparison import gradient_errors, relative_error, worst_of
from colrow.verification.model_run import ModelRun, first_difference, output_error, run
from colrow.verification.reference import prepare_reference, quiet_transformers
from colrow.verification.share import counted_parameters, share_split

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture at one tp size.

    Attributes:
        name, task, system, even, tp: what was compared; the system "generate" is the code of
            ``colrow generate``, see ``benchmarks/zoo/generate.py``.
        verdict: "passed"; "refused", the system said before any number that it cannot; "failed",
            a wrong number, an exception, or nothing was split without a word; "not run", the whole
            model itself cannot be built or run alone.
        reason: one line, for every verdict but "passed".
        share: of the weights of attention, MLPs, embedding and head, what the split spread over
            the ranks; None where it did not come to that.
        output_error, loss_error, gradient_error: relative; the worst of each kind.
        worst_gradient: of which parameter.
        greedy: whether ``model.generate`` gave the whole model's tokens; None where the whole
            model does not generate.
        first_difference: the first module whose output differs.
        seconds_to_split: that the split took.
        traceback: of an exception.
    """

    name: str
    task: str
    system: str
    even: bool
    tp: int
    verdict: str
    reason: str = ""
    share: float | None = None
    output_error: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    worst_gradient: str | None = None
    greedy: bool | None = None
    first_difference: str | None = None
    seconds_to_split: float | None = None
    traceback: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class System:
    """A way to make a model tensor-parallel, which is compared with the whole model.

    Attributes:
        name: for outcomes.
        split: the split model, from the whole one and the directory it was saved in ("" for one
            that was not).
        full_grads: whole gradients under the whole model's names, on rank 0.
        needs_directory: whether it starts from a saved model rather than from one in memory.
    """

    name: str
    split: Callable[[nn.Module, str, Mesh], nn.Module]
    full_grads: Callable[[nn.Module], dict[str, Tensor]]
    needs_directory: bool = False


def _parallelize(model: nn.Module, directory: str, mesh: Mesh) -> nn.Module:
    """What the commands load from a saved text model; any other one is split as it is."""
    if not directory or type(model) not in _text_models():
        split: nn.Module = parallelize(model, mesh)
        return split
    dtype = next(model.parameters()).dtype
    loaded = load_model(directory, mesh, dtype=dtype, in_place=True).module
    return without_dropout(loaded).train()


def _text_models() -> set[type]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes = MODEL_FOR_CAUSAL_LM_MAPPING.values()
    return {cls for each in classes for cls in (each if isinstance(each, tuple) else (each,))}


COLROW = System("colrow", _parallelize, full_grads)


class CannotRun(RuntimeError):
    """The whole model does not run; nothing can be compared with it."""


class Refused(RuntimeError):
    """The system said that it cannot split this model."""


def compare(
    architecture: Architecture,
    tp: int,
    system: System = COLROW,
    directory: str = "",
    tamper: Callable[[nn.Module, int], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Outcome | None:
    """:func:`compare_on`, for all ranks of a world of ``tp``."""
    return compare_on(process_mesh(tp), architecture, system, directory, tamper=tamper, dtype=dtype)


def compare_on(
    mesh: Mesh,
    architecture: Architecture,
    system: System = COLROW,
    directory: str = "",
    *,
    tamper: Callable[[nn.Module, int], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Outcome | None:
    """Splits the architecture's model over ``mesh.tp`` and compares it with the whole one.

    Every rank of the group must call it. Rank 0 also holds the whole model, in fp64.

    Args:
        mesh: with a tp size of at least 2.
        system: what splits the model.
        directory: an empty one, the same for all ranks, for a system that starts from files.
        tamper: applied to the split model on each rank, with the rank; for testing this very check.
        dtype: of the split model: fp64, where 1e-10 is accepted, or fp32, where it is 1e-5, or
            twice what the whole model itself loses to rounding.

    Returns:
        The outcome on rank 0, None elsewhere.

    Communicates: besides what the split model sends, short messages and the gradients.
    """
    try:
        return _compare(mesh, architecture, system, directory, tamper, dtype)
    except (CannotRun, Refused) as error:  # on all ranks alike
        verdict = "refused" if isinstance(error, Refused) else "not run"
        about = (architecture.name, architecture.task, system.name, architecture.even, mesh.tp.size)
        return Outcome(*about, verdict, reason=str(error)) if mesh.tp.rank == 0 else None


def _compare(
    mesh: Mesh,
    architecture: Architecture,
    system: System,
    directory: str,
    tamper: Callable[[nn.Module, int], None] | None,
    dtype: torch.dtype,
) -> Outcome | None:
    saved = directory if system.needs_directory else ""
    model, whole, limit = _whole_model(architecture, mesh, saved, dtype)
    counted = counted_parameters(model)
    begin = time.perf_counter()
    try:
        split = system.split(model, saved or architecture.directory, mesh)
    except (ValueError, NotImplementedError) as error:
        raise Refused(" ".join(str(error).split())) from error
    seconds = time.perf_counter() - begin
    if tamper is not None:
        tamper(split, mesh.tp.rank)
    share = share_split(split, counted, mesh, whole.grads if whole is not None else ())
    generates = [whole is not None and whole.tokens is not None]
    dist.broadcast_object_list(generates, group=mesh.tp.group, group_src=0)
    ours = run(architecture, split, generates=generates[0])
    grads = system.full_grads(split)
    if whole is None:
        return None
    errors = gradient_errors(grads, whole.grads)
    gradient_error, worst = worst_of(errors)
    off_by = {
        "outputs": output_error(ours, whole),
        "loss": relative_error(ours.loss, whole.loss),
        "gradients": gradient_error,
    }
    wrong = [f"{what} off by {error:.0e}" for what, error in off_by.items() if not error <= limit]
    same_tokens = None if whole.tokens is None else ours.tokens == whole.tokens
    if same_tokens is False:
        wrong.append("other greedy tokens")
    if share == 0.0:
        wrong.append("nothing is split, and nothing was said")
    return Outcome(
        architecture.name,
        architecture.task,
        system.name,
        architecture.even,
        mesh.tp.size,
        verdict="failed" if wrong else "passed",
        reason="; ".join(wrong),
        share=share,
        output_error=off_by["outputs"],
        loss_error=off_by["loss"],
        gradient_error=off_by["gradients"],
        worst_gradient=worst,
        greedy=same_tokens,
        first_difference=first_difference(ours, whole, limit) if wrong else None,
        seconds_to_split=seconds,
    )


@cache
def process_mesh(tp: int) -> Mesh:
    """The mesh of this process's world of ``tp`` ranks."""
    return init_mesh(tp=tp, device="cpu")


def _whole_model(
    architecture: Architecture, mesh: Mesh, directory: str, dtype: torch.dtype
) -> tuple[nn.Module, ModelRun | None, float]:
    """The model to split on every rank, and on rank 0 what the whole one gives, and the limit."""
    problem, model, whole, limit = "", None, None, LIMITS[dtype]
    try:
        model = build(architecture, dtype)
        if directory and mesh.tp.rank == 0:
            model.save_pretrained(directory)  # type: ignore[operator]
        if mesh.tp.rank == 0:
            reference = load_saved(model, directory) if directory else build(architecture, dtype)
            rounded = _run_whole(architecture, reference) if dtype != torch.float64 else None
            reference.zero_grad(set_to_none=True)
            whole = _run_whole(architecture, reference.double())
            if rounded is not None:
                limit = max(limit, 2 * _rounding(rounded, whole))
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    problems: list[str] = [""] * mesh.tp.size
    dist.all_gather_object(problems, problem, group=mesh.tp.group)
    if any(problems):
        raise CannotRun(next(problem for problem in problems if problem))
    assert model is not None
    return model, whole, limit


def load_saved(model: nn.Module, directory: str, **options: Any) -> nn.Module:
    """The model of ``model``'s class that was saved in ``directory``, by transformers."""
    dtype = next(model.parameters()).dtype
    with quiet_transformers():
        loaded: nn.Module = type(model).from_pretrained(  # type: ignore[attr-defined]
            directory,
            dtype=dtype,
            experts_implementation="eager",
            local_files_only=True,
            **options,
        )
    return prepare_reference(loaded.to(dtype)).train()


def _rounding(rounded: ModelRun, whole: ModelRun) -> float:
    return max(
        output_error(rounded, whole),
        relative_error(rounded.loss, whole.loss),
        *gradient_errors(rounded.grads, whole.grads).values(),
    )


def _run_whole(architecture: Architecture, model: nn.Module) -> ModelRun:
    try:
        whole = run(architecture, model)
    except Exception:
        # Some that compute a loss cannot generate by themselves.
        model.zero_grad(set_to_none=True)
        whole = run(architecture, model, generates=False)
    if not math.isfinite(float(whole.loss)):
        raise ValueError(f"the loss of the whole model is {float(whole.loss)}")
    whole.grads.update(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    )
    torch.manual_seed(0)
    return whole
