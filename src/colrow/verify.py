"""Is the split model the unsplit one? Logits, loss, every gradient and greedy tokens compared.

The reference is transformers' own model of the same file, unsplit and in fp64, so that an error
here is the distance from the exact result and not from somebody else's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow import rng
from colrow.checkpoint.assemble import full_grads, full_state_dict
from colrow.checkpoint.naming import hf_naming
from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm.collectives import gather_from_tp
from colrow.differences import captured, captured_reference, first_difference, relative_error
from colrow.generate.stream import generate
from colrow.mesh import Mesh
from colrow.models.decoder import Decoder
from colrow.reference import load_reference, precision, reference_grads


@dataclass(frozen=True)
class Tolerances:
    """Largest accepted relative errors, ``||a - b|| / ||b||``."""

    logits: float
    gradients: float
    loss: float


TOLERANCES = {
    torch.float64: Tolerances(logits=1e-12, gradients=1e-12, loss=1e-12),
    torch.float32: Tolerances(logits=1e-5, gradients=1e-5, loss=1e-6),
    torch.bfloat16: Tolerances(logits=2e-2, gradients=2e-2, loss=2e-2),
    torch.float16: Tolerances(logits=2e-2, gradients=2e-2, loss=2e-2),
}


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Attributes:
        passed: everything is within the tolerances and the greedy tokens are equal.
        tp, sequence_parallel, dtype: what was verified.
        logits_error, loss_error: relative errors.
        gradient_errors: checkpoint name of every parameter to its gradient's relative error.
        greedy_equal: whether greedy decoding gave the reference's tokens.
        greedy_tokens, reference_tokens: those tokens.
        first_difference: None, or the first layer whose output differs from the reference's, and
            in brackets the weights of it that do.
        tolerances: what was accepted.
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
    tolerances: Tolerances
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
    batch: int = 2,
    sequence: int = 31,
    new_tokens: int = 16,
    progress: Callable[[str], None] = lambda _: None,
    prepare: Callable[[Decoder], None] = lambda _: None,
) -> Report | None:
    """Compares the checkpoint, split over ``mesh.tp``, with transformers' unsplit model of it.

    Args:
        dtype: of the split model.
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
    model = from_pretrained(path, mesh, dtype=dtype, sequence_parallel=sequence_parallel)
    prepare(model)
    place = torch.arange(batch * sequence, device=mesh.device)
    ids = rng.bits(rng.stream_key(0, "verify"), place).remainder(model.config.vocab_size)
    ids = ids.view(batch, sequence)
    prompt = ids[:1, : max(1, sequence // 2)]
    say("running the split model forward and backward")
    with captured(model) as outputs:
        local_logits = model(ids)
    logits = gather_from_tp(local_logits.detach(), tp, partition=model.layout.vocab, layer="verify")
    loss = model.loss(ids, ids)
    loss.backward()
    grads, weights = full_grads(model), full_state_dict(model)
    say("decoding greedily")
    decoder = model
    if model.sequence_parallel:  # decoding one token at a time has no sequence to divide
        decoder = from_pretrained(path, mesh, dtype=dtype)
        prepare(decoder)
    tokens = generate(decoder, prompt, max_new_tokens=new_tokens).token_ids[0]
    if tp.rank > 0:
        return None
    say("loading the reference (transformers, unsplit, fp64)")
    reference = load_reference(path, torch.float64)
    say("running the reference")
    ids, prompt = ids.cpu(), prompt.cpu()
    with precision(torch.float64), captured_reference(reference, model.config) as expected:
        result = reference(input_ids=ids, labels=ids)
        result.loss.backward()
        expected_tokens = _reference_tokens(reference, prompt, new_tokens)
    limits = TOLERANCES[dtype]
    gradient_errors = {
        name: relative_error(grads[name], grad) if name in grads else float("inf")
        for name, grad in reference_grads(reference, hf_naming(model.config)).items()
    }
    logits_error = relative_error(logits, result.logits)
    loss_error = relative_error(loss, result.loss)
    greedy_equal = tokens == expected_tokens or (
        dtype in (torch.bfloat16, torch.float16)
        and _tied(reference, prompt, tokens, expected_tokens, limits.logits)
    )
    within = (
        logits_error <= limits.logits
        and loss_error <= limits.loss
        and max(gradient_errors.values()) <= limits.gradients
    )
    heads = model.layout.heads
    return Report(
        passed=within and greedy_equal,
        tp=tp.size,
        sequence_parallel=model.sequence_parallel,
        dtype=str(dtype).removeprefix("torch."),
        logits_error=logits_error,
        loss_error=loss_error,
        gradient_errors=gradient_errors,
        greedy_equal=greedy_equal,
        greedy_tokens=tokens,
        reference_tokens=expected_tokens,
        first_difference=first_difference(
            model.config, outputs, expected, weights, reference, limits.logits
        ),
        tolerances=limits,
        weight_bytes_per_rank=weight_bytes_per_rank(model),
        heads_per_rank=list(zip(heads.query.sizes, heads.key_value.sizes, strict=True)),
    )


def weight_bytes_per_rank(model: Decoder) -> list[int]:
    """Bytes of parameters on each rank of the tp group; nothing is sent."""
    itemsize = next(model.parameters()).element_size()
    return [
        itemsize * sum(math.prod(spec.local_shape(rank)) for spec in model.specs.values())
        for rank in range(model.tp.size)
    ]


@torch.no_grad()
def _reference_tokens(reference: nn.Module, prompt: Tensor, new_tokens: int) -> list[int]:
    """Greedy decoding by transformers, without its early stop."""
    generated = reference.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    tokens: list[int] = generated[0, prompt.shape[1] :].tolist()
    return tokens


@torch.no_grad()
def _tied(
    reference: nn.Module, prompt: Tensor, tokens: list[int], expected: list[int], limit: float
) -> bool:
    """Whether two decodings part where the two tokens' logits are equal to within ``limit``.

    In 16 bits such a tie may go either way, and what follows it is a different text.
    """
    parting = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1)
    prefix = torch.cat([prompt, torch.tensor([expected[:parting]], dtype=torch.long)], dim=1)
    logits = reference(input_ids=prefix).logits[0, -1]
    gap = (logits[expected[parting]] - logits[tokens[parting]]).abs()
    return bool(gap <= limit * logits.abs().max())
