"""Does a model whose weights stay quantised compute what the numbers stand for, split or not?

The reference is transformers' unsplit model of the same file in fp64, with the blocks turned into
numbers. In fp64 the blocks are multiplied exactly, so that a wrong division has nowhere to hide. In
fp32 ggml's kernels round what they multiply with to 8 bits; how much that alone costs is measured
on the unsplit quantised model, and twice that error is accepted of the split one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colrow import rng
from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm.collectives import gather_from_tp
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.generation.generate import generate
from colrow.models.decoder import Decoder
from colrow.verification.comparison import relative_error
from colrow.verification.reference import load_reference, precision
from colrow.verification.verify import TOLERANCES, accepted, as_likely


@dataclass(frozen=True)
class QuantisedReport:
    """What :func:`verify_quantised` found.

    Attributes:
        passed: errors are accepted, and every greedy token is, given those before it, as likely in
            the reference as its best one, up to what rounding costs.
        tp, dtype: what was verified; the dtype is that of the activations.
        prompt_error, decoding_error: relative errors of the logits when all tokens come at once,
            and one by one.
        prompt_rounding, decoding_rounding: those of the unsplit quantised model; zeros in fp64.
        accepted_prompt, accepted_decoding: limits.
        greedy_tokens, greedy_likely: what was generated, and whether it could be.
        weight_bytes_per_rank, file_bytes: memory of the weights, and the file's size.
    """

    passed: bool
    tp: int
    dtype: str
    prompt_error: float
    decoding_error: float
    prompt_rounding: float
    decoding_rounding: float
    accepted_prompt: float
    accepted_decoding: float
    greedy_tokens: list[int] = field(repr=False)
    greedy_likely: bool
    weight_bytes_per_rank: list[int]
    file_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def verify_quantised(
    path: str | Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    tensor_split: str | Sequence[float] | None = None,
    sequence: int = 31,
    new_tokens: int = 16,
    progress: Callable[[str], None] = lambda _: None,
) -> QuantisedReport | None:
    """Compares a GGUF file's model, quantised and split over ``mesh.tp``, with the exact one.

    Args:
        dtype: of the activations: fp64 for exact products, fp32 for those that generation makes.
        sequence: random tokens that are compared.
        new_tokens: how many are then decoded greedily.
        progress: told what is being done, on rank 0.

    Returns:
        The report on rank 0 of the tp group, None on the others.

    Communicates: every rank must call it; logits are collected.
    """
    tp = mesh.tp
    say = progress if tp.rank == 0 else lambda _: None
    say("loading the split model, its weights in the file's blocks")
    model = from_pretrained(
        path, mesh, dtype=dtype, quantised=True, tensor_split=tensor_split
    ).for_decoding()
    place = torch.arange(sequence)
    ids = rng.bits(rng.stream_key(0, "verify"), place).remainder(model.config.vocab_size)[None]
    prompt = ids[:, : max(1, sequence // 2)]
    say("running it on all tokens at once, and on one after the other")
    at_once, one_by_one = _both_ways(model, ids)
    tokens = generate(model, prompt, max_new_tokens=new_tokens).token_ids[0]
    if tp.rank > 0:
        return None
    rounding = 0.0, 0.0
    say("loading the reference (transformers, unsplit, in fp64)")
    reference = load_reference(path, torch.float64)
    with precision(torch.float64):
        exact = reference(input_ids=ids).logits
    gap = 1e-9
    if dtype != torch.float64:
        say("running the unsplit quantised model, to see what rounding costs")
        alone = from_pretrained(path, ParallelGroup.single(), dtype=dtype, quantised=True)
        whole = _both_ways(alone.for_decoding(), ids)
        rounding = relative_error(whole[0], exact), relative_error(whole[1], exact)
        gap = 2 * max((each.double() - exact).abs().max().item() for each in whole)
    errors = relative_error(at_once, exact), relative_error(one_by_one, exact)
    limits = tuple(accepted(TOLERANCES[dtype].logits, each) for each in rounding)
    likely = as_likely(reference, prompt, tokens, gap)
    return QuantisedReport(
        passed=likely and errors[0] <= limits[0] and errors[1] <= limits[1],
        tp=tp.size,
        dtype=str(dtype).removeprefix("torch."),
        prompt_error=errors[0],
        decoding_error=errors[1],
        prompt_rounding=rounding[0],
        decoding_rounding=rounding[1],
        accepted_prompt=limits[0],
        accepted_decoding=limits[1],
        greedy_tokens=tokens,
        greedy_likely=likely,
        weight_bytes_per_rank=model.weight_bytes_per_rank(),
        file_bytes=os.path.getsize(resolve_model_path(path)),
    )


def _both_ways(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Whole logits ``[1, tokens, vocabulary]``: of all tokens at once, and of one by one."""
    tp, cache = model.tp, model.make_cache(1, ids.shape[1])
    steps = [
        model.last_logits(ids[:, i : i + 1], attention_mask=None, cache=cache)
        for i in range(ids.shape[1])
    ]
    local = model(ids), torch.stack(steps, 1)
    first, second = (
        gather_from_tp(each, tp, partition=model.vocab, layer="verify") for each in local
    )
    return first, second
