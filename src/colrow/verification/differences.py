"""Where a split model first departs from its reference: outputs layer by layer, then weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from colrow.checkpoint.naming import Naming, hf_naming
from colrow.comm.collectives import gather_from_sequence
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.partition import Partition
from colrow.verification.comparison import first_outputs, first_over
from colrow.verification.reference import reference_names


@dataclass(frozen=True)
class BatchResult:
    """What one run of a model over a batch gave: whole tensors, gradients by checkpoint name."""

    logits: Tensor
    loss: Tensor
    grads: Mapping[str, Tensor]

    def not_finite(self) -> str:
        """Which of them hold NaN or Inf, as the beginning of a phrase; empty when none does."""
        parts = {
            "logits": [self.logits],
            "loss": [self.loss],
            "gradients": list(self.grads.values()),
        }
        bad = [name for name, tensors in parts.items() if not all(_is_finite(t) for t in tensors)]
        return f"{', '.join(bad)} not finite" if bad else ""


def why_not_finite(
    split: BatchResult,
    rounded: BatchResult | None,
    exact: BatchResult,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> str | None:
    """Whose numbers are NaN or Inf, and why as far as that can be said; None when all are finite.

    Args:
        split, rounded, exact: of the split model, of the unsplit one in the same precision (None
            when that is fp64) and in fp64.
        weights: the split model's, whole.
        dtype: that precision.
    """
    precision = str(dtype).removeprefix("torch.")
    bad = [name for name, weight in weights.items() if not _is_finite(weight)]
    held = f": NaN or Inf is in {', '.join(bad[:3])}" if bad else ""
    if lost := exact.not_finite():
        return f"{lost} in the unsplit model, even in fp64: nothing can be compared{held}"
    if lost := split.not_finite():
        if rounded is not None and rounded.not_finite():
            wider = "bf16 or fp32" if dtype == torch.float16 else "a wider precision"
            return f"{lost} in {precision}, split or not: the model overflows it; use {wider}"
        return f"{lost} in the split model, unlike the unsplit one{held}"
    if rounded is not None and (lost := rounded.not_finite()):
        return f"{lost} in the unsplit model in {precision}: what rounding costs is unknown"
    return None


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


@contextmanager
def captured(model: Decoder) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the embedding, of each block and of the final norm, whole.

    With sequence parallelism each is gathered: every rank must run the model.
    """
    outputs: dict[str, Tensor] = {}
    length = 0

    def remember_length(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal length
        length = args[0].shape[1]

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        def keep(_: nn.Module, args: object, output: Tensor) -> None:
            whole = output.detach()
            if model.sequence_parallel:
                divided = Partition.even(length, model.tp.size)
                whole = gather_from_sequence(whole, model.tp, partition=divided, layer="verify")
            outputs[name] = whole.cpu()

        return model.get_submodule(name).register_forward_hook(keep)

    handles = [model.register_forward_pre_hook(remember_length)]
    handles += [hook(name) for name in _layers(model.config, hf_naming(model.config))]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def captured_reference(
    reference: nn.Module, config: ModelConfig
) -> AbstractContextManager[dict[str, Tensor]]:
    """The same outputs of the first forward pass of a transformers model."""
    layers = _layers(config, hf_naming(config)).items()
    return first_outputs({name: reference.get_submodule(theirs) for name, theirs in layers})


def first_difference(
    config: ModelConfig,
    outputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    reference: nn.Module,
    limit: float,
) -> str | None:
    """The first layer, in checkpoint names, whose output is off by more than ``limit``.

    Weights of that layer that differ from the reference's follow in brackets. Where every output
    agrees (the inputs need not touch every row of an embedding), the weights that differ.

    Args:
        outputs, expected: by colrow's names, as :func:`captured` collects them, and the logits
            under "head".
    """
    naming = hf_naming(config)
    theirs = reference_names(reference, reference.state_dict(), naming)
    wrong = [
        name for name, ours in weights.items() if name in theirs and not _same(ours, theirs[name])
    ]
    layers = {**_layers(config, naming), "head": naming.modules["head"][0]}
    name = first_over(((n, outputs[n], expected[n]) for n in layers), limit)
    if name is None:
        return f"no layer's output, but weights: {', '.join(wrong)}" if wrong else None
    layer = prefix = layers[name]
    if name == "head" and config.tie_embeddings:
        prefix = layers["embedding"]
        layer = f"{layer}, tied to {prefix}"
    inside = [key for key in wrong if key.startswith(f"{prefix}.")]
    return f"{layer} (its weights differ: {', '.join(inside)})" if inside else layer


def worst_gradients(worse: Mapping[str, float]) -> str | None:
    """The three gradients that are off the most, in words; None when there are none."""
    if not worse:
        return None
    names = sorted(worse, key=lambda name: -worse[name])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"no layer's output or weights, but gradients: {', '.join(names[:3])}{more}"


def _same(weight: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(weight, theirs.to(weight.dtype), rtol=0, atol=0, equal_nan=True)


def _layers(config: ModelConfig, naming: Naming) -> dict[str, str]:
    """colrow's modules in the order of the forward pass, and the checkpoint's names for them."""
    before, number, _ = naming.modules["blocks.{i}.attention.output"][0].partition("{i}")
    block = before + number
    return {
        "embedding": naming.modules["embedding"][0],
        **{f"blocks.{i}": block.format(i=i) for i in range(config.num_layers)},
        "norm": naming.modules["norm"][0],
    }
