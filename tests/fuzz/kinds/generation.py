"""Greedy decoding with a cache, rows of different lengths, against transformers without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import colrow
from colrow.generation.generate import generate
from tests.fuzz.case import Case, Fields, Kind, OneOf, World, grids
from tests.fuzz.decoders import LAYOUT, MODEL, make, options_of, tokens, whole_logits


def fields(ranks: int) -> Fields:
    pipes = [[pp, tp] for pp, dp, tp in grids(ranks) if dp == 1]
    return Fields(
        {
            **MODEL,
            **{name: LAYOUT[name] for name in LAYOUT},
            "pipe": OneOf(pipes),
            "prompts": OneOf([[4], [4, 4], [5, 2], [1], [3, 1, 6], [7, 7, 1, 2]]),
            "new": OneOf([5, 1, 12]),
            "eos": OneOf([False, True]),
            "for_decoding": OneOf([False, True]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    whole = make(world, case)
    pp, tp = case["pipe"]
    mesh = world.mesh(tp=tp, pp=pp)
    model = colrow.from_pretrained(
        world.directory / "model", mesh, dtype=torch.float64, **options_of(case, tp)
    )
    if case["for_decoding"]:
        model.for_decoding()
    rows, longest = case["prompts"], max(case["prompts"])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in rows])
    ids = tokens(case, len(rows), longest) * mask
    # Of the tokens that come anyway the third ends a row.
    expected = _reference(whole, ids, mask, case["new"], [])
    eos = [int(expected[0, min(2, case["new"] - 1)])] if case["eos"] else []
    expected = _reference(whole, ids, mask, case["new"], eos)
    found = generate(
        model,
        ids,
        attention_mask=mask,
        max_new_tokens=case["new"],
        eos_token_ids=eos,
        pad_token_id=0,
    )
    wrong = []
    if not torch.equal(found.tokens, expected):
        wrong.append(f"tokens are {found.tokens.tolist()}, not {expected.tolist()}")
    return wrong


@torch.inference_mode()
def _reference(whole: Any, ids: Tensor, mask: Tensor, new: int, eos: list[int]) -> Tensor:
    """Greedy tokens of transformers' model without a cache, whole rows at every step."""
    ended = torch.zeros(len(ids), dtype=torch.bool)
    rows, tokens = ids, []
    for _ in range(new):
        following = whole_logits(whole, rows, mask)[:, -1].argmax(-1).masked_fill(ended, 0)
        tokens.append(following)
        ended |= torch.isin(following, torch.tensor(eos, dtype=torch.int64))
        if bool(ended.all()):
            break
        rows = torch.cat([rows, following[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(tokens, 1)


GENERATION = Kind("generation", fields, run, weight=2)
