"""Is the split model the unsplit one? Logits, loss, every gradient and greedy tokens compared.

The reference is transformers' own model of the same file, unsplit and in fp64, so that an error
here is the distance from the exact result and not from somebody else's rounding. How much rounding
alone costs is measured too: the unsplit model runs once more in the precision that is verified, and
where its own error is above the tolerance, twice that error is accepted, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.checkpoint.assemble import full_grads, full_state_dict
from colrow.checkpoint.naming import Naming, hf_naming
from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm.collectives import gather_from_tp
from colrow.comm.mesh import Mesh
from colrow.generation.generate import generate
from colrow.models.decoder import Decoder
from colrow.verification.comparison import gradient_errors, relative_error
from colrow.verification.differences import (
    BatchResult,
    captured,
    captured_reference,
    first_difference,
    why_not_finite,
    worst_gradients,
)
from colrow.verification.reference import cached_step, load_reference, precision, reference_grads


@dataclass(frozen=True)
class Errors:
    """Relative errors, ``||a - b|| / ||b||``: of logits, of the loss, of the worst gradient."""

    logits: float
    loss: float
    gradients: float


TOLERANCES = {
    torch.float64: Errors(logits=1e-12, gradients=1e-12, loss=1e-12),
    torch.float32: Errors(logits=1e-5, gradients=1e-5, loss=1e-6),
    torch.bfloat16: Errors(logits=2e-2, gradients=2e-2, loss=2e-2),
    torch.float16: Errors(logits=2e-2, gradients=2e-2, loss=2e-2),
}


def accepted(tolerance: float, rounding: float) -> float:
    """The larger one of the tolerance and twice what rounding alone costs.

    An overflow of the unsplit model is no excuse: it leaves the tolerance as it is.
    """
    return max(tolerance, 2 * rounding) if math.isfinite(rounding) else tolerance


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Attributes:
        passed: everything is within the tolerances and the greedy tokens are equal.
        tp, sequence_parallel, dtype: what was verified.
        logits_error, loss_error: relative errors.
        gradient_errors: checkpoint name of every parameter to its gradient's relative error.
        greedy_equal: whether greedy decoding gave the reference's tokens. In 16 bits, where the
            most likely tokens may tie: whether every token is, given those before it, as likely in
            the reference as its best one, up to what rounding costs.
        greedy_tokens, reference_tokens: those tokens.
        first_difference: None when it passed; else the first layer whose output differs, and in
            brackets the weights of it that do; else weights or gradients that differ.
        not_finite: None, or whose numbers are NaN or Inf, and why. Decoding is left out when it is
            the split model's logits.
        rounding: errors of the unsplit model itself when it runs in ``dtype``; zeros for fp64.
        tolerances: what was accepted of logits and loss, and at least of gradients.
        gradient_tolerances: what was accepted of each gradient.
        weight_bytes_per_rank: bytes of parameters that each rank holds.
        heads_per_rank: query and KV heads that each rank holds.
    """

    passed: bool
    tp: int
    sequence_parallel: bool
    dtype: str
    logits_error: float
    loss_error: float
    gradient_errors: dict[str, float]
    greedy_equal: bool
    greedy_tokens: list[int] = field(repr=False)
    reference_tokens: list[int] = field(repr=False)
    first_difference: str | None
    not_finite: str | None
    rounding: Errors
    tolerances: Errors
    gradient_tolerances: dict[str, float]
    weight_bytes_per_rank: list[int]
    heads_per_rank: list[tuple[int, int]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verify(
    path: str | Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    tensor_split: str | Sequence[float] | None = None,
    batch: int = 2,
    sequence: int = 31,
    new_tokens: int = 16,
    progress: Callable[[str], None] = lambda _: None,
    prepare: Callable[[Decoder], None] = lambda _: None,
) -> Report | None:
    """Compares the checkpoint, split over ``mesh.tp``, with transformers' unsplit model of it.

    Args:
        dtype: of the split model.
        tensor_split: the ranks' shares of every tensor; equal by default.
        batch, sequence: shape of the batch of random tokens that is compared. An odd length also
            tests a sequence that does not divide under sequence parallelism.
        new_tokens: how many tokens are decoded greedily from the batch's first row.
        progress: told what is being done, on rank 0.
        prepare: applied to the split model before the comparison; for testing this very check.

    Returns:
        The report on rank 0 of the tp group, None on the others.

    Communicates: every rank must call it; weights, gradients and outputs are collected on rank 0,
    which also holds the whole reference in fp64.
    """
    tp = mesh.tp
    say = progress if tp.rank == 0 else lambda _: None
    say("loading the split model")
    model = from_pretrained(
        path,
        mesh,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        tensor_split=tensor_split,
    )
    prepare(model)
    place = torch.arange(batch * sequence, device=mesh.device)
    ids = rng.bits(rng.stream_key(0, "verify"), place).remainder(model.config.vocab_size)
    ids = ids.view(batch, sequence)
    prompt = ids[:1, : max(1, sequence // 2)]
    say("running the split model forward and backward")
    with captured(model) as outputs:
        local_logits = model(ids)
    logits = gather_from_tp(local_logits.detach(), tp, partition=model.vocab, layer="verify")
    loss = model.loss(ids, ids)
    loss.backward()
    split, weights = BatchResult(logits, loss, full_grads(model)), full_state_dict(model)
    tokens: list[int] = []
    if bool(logits.isfinite().all()):  # whole on every rank: all decide alike
        say("decoding greedily")
        tokens = generate(model, prompt, max_new_tokens=new_tokens).token_ids[0]
    if tp.rank > 0:
        return None
    say("loading the reference (transformers, unsplit)")
    reference = load_reference(path, dtype)
    naming, ids, prompt = hf_naming(model.config), ids.cpu(), prompt.cpu()
    rounded = None
    if dtype != torch.float64:
        narrow = str(dtype).removeprefix("torch.")
        say(f"running the reference in {narrow}, to see what rounding costs")
        rounded = _run_reference(reference, ids, naming)
        reference = reference.double()
    say("running the reference in fp64")
    with captured_reference(reference, model.config) as expected:
        exact = _run_reference(reference, ids, naming)
    with precision(torch.float64):
        expected_tokens = _reference_tokens(reference, prompt, new_tokens)
    off_by = gradient_errors(split.grads, exact.grads, small=0.0)
    errors = Errors(
        relative_error(logits, exact.logits),
        relative_error(loss, exact.loss),
        max(off_by.values()),
    )
    tolerance, rounding = TOLERANCES[dtype], Errors(0.0, 0.0, 0.0)
    gradient_rounding = dict.fromkeys(off_by, 0.0)
    if rounded is not None:
        gradient_rounding = gradient_errors(rounded.grads, exact.grads, small=0.0)
        rounding = Errors(
            relative_error(rounded.logits, exact.logits),
            relative_error(rounded.loss, exact.loss),
            max(gradient_rounding.values()),
        )
    limits = Errors(
        accepted(tolerance.logits, rounding.logits),
        accepted(tolerance.loss, rounding.loss),
        tolerance.gradients,
    )
    gradient_limits = {
        name: accepted(tolerance.gradients, gradient_rounding.get(name, 0.0)) for name in off_by
    }
    greedy_equal = tokens == expected_tokens
    if tokens and not greedy_equal and rounded is not None and dtype.itemsize == 2:
        # Each of two logits may be off by this much.
        gap = 2 * (rounded.logits.double() - exact.logits).abs().max().item()
        greedy_equal = math.isfinite(gap) and as_likely(reference, prompt, tokens, gap)
    worse = {name: error for name, error in off_by.items() if not error <= gradient_limits[name]}
    passed = (
        errors.logits <= limits.logits and errors.loss <= limits.loss and not worse and greedy_equal
    )
    difference = None
    if not passed:
        outputs["head"], expected["head"] = logits.cpu(), exact.logits
        difference = first_difference(
            model.config, outputs, expected, weights, reference, limits.logits
        ) or worst_gradients(worse)
    heads = model.config.blocks[0].attention.heads(model.division)
    return Report(
        passed=passed,
        tp=tp.size,
        sequence_parallel=model.sequence_parallel,
        dtype=str(dtype).removeprefix("torch."),
        logits_error=errors.logits,
        loss_error=errors.loss,
        gradient_errors=off_by,
        greedy_equal=greedy_equal,
        greedy_tokens=tokens,
        reference_tokens=expected_tokens,
        first_difference=difference,
        not_finite=why_not_finite(split, rounded, exact, weights, dtype),
        rounding=rounding,
        tolerances=limits,
        gradient_tolerances=gradient_limits,
        weight_bytes_per_rank=model.weight_bytes_per_rank(),
        heads_per_rank=list(zip(heads.query.sizes, heads.key_value.sizes, strict=True)),
    )


def _run_reference(reference: nn.Module, ids: Tensor, naming: Naming) -> BatchResult:
    dtype = next(reference.parameters()).dtype
    with precision(dtype):
        result = reference(input_ids=ids, labels=ids)
        result.loss.backward()
    grads = reference_grads(reference, naming)
    reference.zero_grad(set_to_none=True)
    return BatchResult(result.logits.detach(), result.loss.detach(), grads)


@torch.no_grad()
def _reference_tokens(reference: nn.Module, prompt: Tensor, new_tokens: int) -> list[int]:
    """Greedy decoding by transformers' model and cache, past any end-of-sequence token."""
    tokens: list[int] = []
    past, step = None, prompt
    for _ in range(new_tokens):
        logits, past = cached_step(reference, step, past)
        step = logits[:, -1:].argmax(-1)
        tokens.append(int(step))
    return tokens


@torch.no_grad()
def as_likely(reference: nn.Module, prompt: Tensor, tokens: list[int], gap: float) -> bool:
    """Whether each token's logit is within ``gap`` of the best one's, given those before it."""
    text = torch.cat(
        [prompt, torch.tensor([tokens], dtype=torch.long, device=prompt.device)], dim=1
    )
    with precision(torch.float64):
        logits = reference(input_ids=text).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, text[0, prompt.shape[1] :, None]).squeeze(1)
    return bool((logits.amax(1) - chosen <= gap).all())
