"""``colrow.parallelize``: any transformer, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.comm.mesh import Mesh
from colrow.inplace.analysis import Analysis, analyse
from colrow.inplace.apply.agreement import check_equal_weights, find_alike
from colrow.inplace.apply.record import SplitRecord, check_whole, record_of
from colrow.inplace.apply.same_inputs import compare_inputs
from colrow.inplace.check import Evaluation, evaluate
from colrow.inplace.observe.modes import evaluating, without_fused_kernels
from colrow.inplace.plan import Plan
from colrow.inplace.split import carry_out, split_checked
from colrow.inplace.weights.load import checked_names, fill, open_weights
from colrow.inplace.weights.meta import give_buffers, is_on_meta, model_of
from colrow.inplace.weights.stand_in import StandIn
from colrow.shards.steps import watch


def parallelize(
    model: nn.Module | str | Path,
    mesh: Mesh,
    plan: str | Mapping[str, str] = "auto",
    *,
    weights: str | Path | None = None,
    dtype: torch.dtype | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    sequence_parallel: bool = False,
    check: bool = True,
    check_inputs: bool = True,
) -> nn.Module:
    """Makes a model tensor-parallel in place; returns the same object.

    Every rank starts from the same whole model and keeps its part. Modules and parameters keep
    their names; modules that are split become instances of a class derived from their own. Which
    layers are split, and how their features go to the ranks, is inferred from the model itself:
    nothing is split that was not proven to give the same values and gradients.

    A model on the meta device is analysed with made-up weights, and split without values; then
    each rank reads its part of ``weights``, or of what :func:`load_weights` is given later. No
    rank holds a whole large weight at any time.

    Args:
        model: any transformer; a model of transformers needs nothing else. Or the path of a
            directory that transformers saved (or a hub id that is in the local cache), of which
            every rank reads its part; the model is then in eval mode.
        mesh: the grid of ranks.
        plan: "auto" splits all that can be; a dictionary from patterns to styles, as
            :func:`plan_for` gives, splits what it names, and nothing is accepted that cannot be;
            "transformers" takes the plan that comes with the model as such a dictionary.
        weights: the checkpoint for a model on the meta device, see :func:`load_weights`.
        dtype: of a model that is given as a path; by default the one that is saved with it.
        example_inputs: keyword arguments for one small forward pass; made up for transformers'
            models.
        sequence_parallel: divide the tokens over the ranks between the split layers of every
            block; refused, with the reason, where that is not proven.
        check: compare results, loss and gradients of the split model with the whole one's; on the
            meta device, results, loss and the gradients of small parameters, with made-up weights.
        check_inputs: compare arguments, modes and dropout's random numbers over the ranks in every
            forward pass that is not compiled (one all-reduce of 32 bytes), since different ones
            give wrong numbers silently. May be changed later, as ``model.check_inputs``.

    Raises:
        ValueError: when nothing can be split, a plan cannot be followed, the ranks hold different
            weights, the files do not fit, or the check finds a difference; the model is then as it
            was. On all ranks alike.
        RuntimeError: another rank failed, or this rank alone did while the others compute.
    """
    options = _Options(plan, example_inputs, sequence_parallel, check)
    # The proof takes gradients, and runs layers one by one.
    with torch.inference_mode(False), torch.enable_grad(), without_fused_kernels():
        split = _parallelize(model, mesh, options, weights, dtype)
    if (record := record_of(split)) is not None:
        watch(split, record.tp)
    compare_inputs(split, enabled=check_inputs)
    return split


def _parallelize(
    model: nn.Module | str | Path,
    mesh: Mesh,
    options: _Options,
    weights: str | Path | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    tp = mesh.tp
    if isinstance(model, nn.Module):
        if dtype is not None:
            raise ValueError("dtype is for a model that is given as a path; use model.to(dtype)")
    else:
        if weights is not None:
            raise ValueError(f"weights: {model} is read; leave them out")
        weights = model
        model = model_of(model, dtype)
    check_whole(model)
    if is_on_meta(model):
        with evaluating(model):
            return _without_values(model, mesh, weights, options)
    if weights is not None:
        raise ValueError("weights are for a model on the meta device; this one has its own")
    if tp.size == 1:
        return model
    check_equal_weights(model, tp)
    with evaluating(model):
        return _with_values(model, mesh, options)


@dataclass(frozen=True)
class _Options:
    """Arguments of :func:`parallelize`."""

    plan: str | Mapping[str, str]
    example_inputs: Mapping[str, Any] | None
    sequence_parallel: bool
    check: bool

    def analyse(self, model: nn.Module, mesh: Mesh, stand_in: StandIn | None = None) -> Analysis:
        """What every rank finds, the same on all; as :func:`find_alike`."""
        return find_alike(
            lambda: analyse(
                model,
                mesh.tp.size,
                self.plan,
                self.example_inputs,
                stand_in=stand_in,
                sequence_parallel=self.sequence_parallel,
            ),
            Analysis.described,
            mesh.tp,
            mesh.device,
        )


def _with_values(model: nn.Module, mesh: Mesh, options: _Options) -> nn.Module:
    found = options.analyse(model, mesh)
    if not options.check:
        carry_out(model, mesh.tp, found, found.vocabulary).settle()
        return model
    labels = found.has_loss
    whole = evaluate(model, found.batch, with_labels=labels, results=found.results)

    def evaluated(_: SplitRecord) -> Evaluation:
        return evaluate(model, found.batch, with_labels=labels, drops=whole.drops)

    split_checked(model, mesh, found, whole, evaluated)
    return model


def _without_values(
    model: nn.Module, mesh: Mesh, weights: str | Path | None, options: _Options
) -> nn.Module:
    reader = None if weights is None else open_weights(weights)
    try:
        names = None if reader is None else checked_names(model, reader)
        give_buffers(model, names, mesh.device)
        if mesh.tp.size > 1:
            _split_without_values(model, mesh, options, stays_empty=reader is None)
        if reader is not None and names is not None:
            fill(model, names, reader, mesh.device)
    finally:
        if reader is not None:
            reader.close()
    return model


def _split_without_values(
    model: nn.Module, mesh: Mesh, options: _Options, *, stays_empty: bool
) -> None:
    """Splits a model on the meta device; the check fills it with made-up weights.

    Args:
        stays_empty: whether it is on the meta device again afterwards.
    """
    stand_in = StandIn(model)
    found = options.analyse(model, mesh, stand_in)
    if not options.check:
        carry_out(model, mesh.tp, found, found.vocabulary).settle()
        return
    labels = found.has_loss
    with stand_in.running():
        whole = evaluate(
            stand_in.model,
            found.batch,
            with_labels=labels,
            of=stand_in.small,
            results=found.results,
        )
    finite = [y[torch.isfinite(y)] for y in whole.results]
    if not any(y.numel() and float(y.std()) > 0 for y in finite):
        raise ValueError(
            f"{type(model).__name__} on the meta device: with made-up weights it gives nothing "
            "that could be compared; load its weights first"
        )
    emptied: list[Callable[[], None]] = []

    def evaluated(record: SplitRecord) -> Evaluation:
        emptied[:] = stand_in.fill(model, record, mesh.device)
        first = next(model.parameters())
        batch = pytree.tree_map(lambda leaf: _placed(leaf, first), dict(found.batch))
        return evaluate(model, batch, with_labels=labels, of=stand_in.small, drops=whole.drops)

    split_checked(model, mesh, found, whole, evaluated)
    if stays_empty:
        for step in emptied:
            step()


def _placed(leaf: Any, like: Tensor) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(like) if leaf.is_floating_point() else leaf.to(like.device)


def plan_for(
    model: nn.Module | str | Path,
    tp: int | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """What :func:`parallelize` would do with a model on ``tp`` ranks (2 by default); sends nothing.

    Args:
        model: as for :func:`parallelize`; of a directory only the configuration is read. Buffers
            of a model on the meta device get their values.

    Returns:
        A dictionary of patterns and styles, which may be edited and given to ``parallelize``. Its
        ``rows`` say for everything in the model what happens to it and why.

    Raises:
        ValueError: when nothing can be split.
    """
    if not isinstance(model, nn.Module):
        model = model_of(model, None)
    check_whole(model)
    with torch.inference_mode(False), torch.enable_grad(), without_fused_kernels():
        if not is_on_meta(model):
            return analyse(model, tp or 2, "auto", example_inputs).plan
        give_buffers(model, None, torch.device("cpu"))
        return analyse(model, tp or 2, "auto", example_inputs, stand_in=StandIn(model)).plan
