"""Prompt in, tokens out: the loop around a model, its cache and the sampler."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from colrow import rng
from colrow.generation.relay import Relay, RowGroup
from colrow.generation.rows import Rows
from colrow.generation.sampling import next_tokens
from colrow.generation.sampling_settings import Sampling
from colrow.models.inputs import check_batch, check_same_on_all_ranks
from colrow.models.interface import TensorParallelModel

_GREEDY = Sampling()


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        tokens: ``[batch, new]`` int64 on the model's device, the same on every rank; behind a
            row's end-of-sequence token there is padding.
        token_ids: the same by row, without the padding; an end-of-sequence token is included.
        finished: by row, whether it ended with an end-of-sequence token.
        time_to_first_token_seconds: from the call, all ranks being there, until the host knows the
            first token: the forward pass of the prompt.
        decode_seconds: from then until the last token; 0 for one token.
        cache_bytes: what this rank keeps of the tokens: keys and values of its heads and layers.
    """

    tokens: Tensor
    token_ids: list[list[int]]
    finished: list[bool]
    time_to_first_token_seconds: float
    decode_seconds: float
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows after their first, over ``decode_seconds``: the prompt is left out.

        For one token a row, which has no such time, the time to the first token is taken.
        """
        if self.decode_seconds == 0:
            return len(self.token_ids) / self.time_to_first_token_seconds
        return sum(len(row) - 1 for row in self.token_ids) / self.decode_seconds


@torch.inference_mode()
def generate(
    model: TensorParallelModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Continues a batch of prompts; all ranks of the model call it with the same arguments.

    With pipeline parallelism the rows are cut into as many parts as there are stages (see
    :mod:`colrow.generation.relay`), which keeps all stages busy where there are enough rows. Where
    an architecture gives padded rows other logits than they have alone, rows come one by one.

    Sends, for each token, what one forward pass of the model sends and what
    :func:`next_tokens` sends; in a pipeline, the hidden states of the new positions from stage to
    stage and 8 bytes a row from the last stage to each other one; once, an all-reduce of 16 bytes
    over tp, and one over pp, that compares the prompts.

    Args:
        input_ids: ``[batch, sequence]`` int64. Prompts of different lengths are padded on the left.
        attention_mask: ``[batch, sequence]``, 0 at padding; by default there is none.
        max_new_tokens: where to stop at the latest.
        sampling: how tokens are chosen. Noise follows the row's number in the batch.
        eos_token_ids: a row ends with the first of these; generation ends when all rows have.
        pad_token_id: what finished rows are filled with; by default the model's, else the first
            end-of-sequence token.
        on_tokens: called after each step with the new token of every row.

    Raises:
        ValueError: a mask with padding on the right, a sequence that would outgrow learned
            positions, ranks that were given different prompts, logits that are NaN, a rank with
            several pipeline stages.
    """
    batch, length = _checked_shape(model, input_ids, attention_mask, max_new_tokens)
    relay, device = Relay(model), input_ids.device
    settings = rng.stream_key(0, max_new_tokens, sampling, tuple(eos_token_ids))
    given = (input_ids, attention_mask, torch.tensor([settings], device=device))
    for group in (model.tp, relay.pp):
        check_same_on_all_ranks(group, *given, layout=relay.layout)
    started = time.perf_counter()
    if pad_token_id is None:
        pad_token_id = model.description.pad_token_id
    padding = next((t for t in (pad_token_id, *eos_token_ids) if t is not None), 0)
    mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        mask = torch.ones(batch, length + max_new_tokens, dtype=torch.bool, device=device)
        mask[:, :length] = attention_mask.bool()
    rows = Rows(batch, eos_token_ids, padding, on_tokens)
    groups = relay.parts(batch, length + max_new_tokens, mask)
    was_training = model.module.training
    model.module.eval()
    try:
        for parts in groups:
            _continue(relay, parts, rows, input_ids, max_new_tokens, sampling)
    finally:
        model.module.train(was_training)
    ended = time.perf_counter()
    steps = [rows.step(number) for number in range(rows.steps)]
    return Generation(
        tokens=torch.tensor(steps, device=device).T.contiguous(),
        token_ids=rows.tokens,
        finished=rows.finished,
        time_to_first_token_seconds=rows.first_token_at - started,
        decode_seconds=ended - rows.first_token_at if rows.steps > 1 else 0.0,
        cache_bytes=sum(part.cache.bytes for parts in groups for part in parts),
    )


def _continue(
    relay: Relay,
    parts: list[RowGroup],
    rows: Rows,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Takes turns with these parts of the batch until all of them have ended."""
    length = input_ids.shape[1]
    for step in range(max_new_tokens):
        for part in parts:
            _learn(relay, part, rows)
            if not rows.ended(part.start, part.stop):
                ids = input_ids[part.start : part.stop, part.skipped :]
                past = length - part.skipped + step
                if step:
                    over = relay.starts_over(part, past)
                    before = range(0 if over else step - 1, step)
                    chosen = [rows.step(each, part.start, part.stop) for each in before]
                    new = torch.tensor(chosen, device=input_ids.device).T
                    ids = torch.cat([ids, new], dim=1) if over else new
                seen = None if part.mask is None else part.mask[:, :past]
                _turn(relay, part, rows, ids, seen, sampling, step)
        if rows.ended(parts[0].start, parts[-1].stop):
            break
    for part in parts:
        _learn(relay, part, rows)
    relay.finish(parts)


def _learn(relay: Relay, part: RowGroup, rows: Rows) -> None:
    """Waits for the tokens that another stage has been choosing, if it has."""
    tokens = relay.receive_tokens(part)
    if tokens is not None:
        rows.add(part.start, tokens)


def _turn(
    relay: Relay,
    part: RowGroup,
    rows: Rows,
    ids: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    step: int,
) -> None:
    """One part of the batch through this rank's stage."""
    model, stage = relay.model, relay.stage
    x = ids if stage.is_first else relay.receive_hidden(part, ids.shape[1])
    if not stage.is_last:
        relay.send_hidden(part, model.module(x, attention_mask=mask, cache=part.cache))
        return
    logits = model.last_logits(x, attention_mask=mask, cache=part.cache)
    chosen = next_tokens(
        logits, model.tp, model.vocabulary, sampling, step=step, first_row=part.start
    ).cpu()
    if not stage.is_first:
        relay.send_tokens(part, chosen)
    rows.add(part.start, chosen.tolist())


def _checked_shape(
    model: TensorParallelModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
) -> tuple[int, int]:
    known = model.description
    longest = known.max_positions if known.limited else None
    check_batch(input_ids, attention_mask, 0, longest)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1 is needed")
    batch, length = input_ids.shape
    if longest is not None and length + max_new_tokens > longest:
        raise ValueError(
            f"{length} prompt tokens and max_new_tokens={max_new_tokens} are more than the "
            f"model's {longest} positions: shorten the prompt or set max_new_tokens to at most "
            f"{longest - length}"
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError(
            "attention_mask is 0 at the last position of a row: pad on the left, so that every "
            "prompt ends where the new tokens begin"
        )
    return batch, length
