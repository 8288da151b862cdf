"""The decoder on tp ranks against transformers: logits, loss, all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

import colrow
from colrow.comm.collectives import gather_from_tp
from tests.fuzz import compare
from tests.fuzz.case import Case, Fields, Kind, OneOf, World
from tests.fuzz.decoders import (
    IGNORED,
    LAYOUT,
    LIMIT,
    MODEL,
    make,
    next_token_loss,
    options_of,
    tokens,
    whole_gradients,
    whole_logits,
)


def fields(ranks: int) -> Fields:
    return Fields(
        {
            **MODEL,
            **LAYOUT,
            "tp": OneOf([ranks, *(n for n in range(1, ranks) if ranks % n == 0)]),
            "rows": OneOf([2, 1, 3]),
            "length": OneOf([8, 2, 3, 5, 11, 17, 1]),
            "mask": OneOf(["none", "left", "ones", "right"]),
            "ignored": OneOf(["none", "some", "row", "all but one"]),
            "smoothing": OneOf([0.0, 0.1]),
            "z_loss": OneOf([0.0, 0.01]),
            "reduction": OneOf(["mean", "sum", "none"]),
        }
    )


def run(world: World, case: Case) -> list[str]:
    whole = make(world, case)
    mesh = world.mesh(tp=case["tp"])
    model = colrow.from_pretrained(
        world.directory / "model", mesh, dtype=torch.float64, **options_of(case, mesh.tp.size)
    )
    ids, mask = tokens(case, case["rows"], case["length"]), _mask(case)
    labels = _labels(case, ids, mask)

    expected = whole_logits(whole, ids, mask)
    names = ("smoothing", "z_loss", "reduction")
    expected_loss = next_token_loss(expected, labels, **{name: case[name] for name in names})
    local = model(ids, attention_mask=mask)
    logits = gather_from_tp(local, mesh.tp, partition=model.vocab)
    valid = slice(None) if mask is None else mask.bool()
    wrong = compare.difference("logits", logits[valid], expected[valid], LIMIT)
    if case["length"] == 1:  # nothing to predict
        (expected * expected.detach().sin()).sum().backward()
        (local * local.detach().sin()).sum().backward()
    else:
        loss = model.loss(
            ids,
            labels,
            attention_mask=mask,
            label_smoothing=case["smoothing"],
            z_loss=case["z_loss"],
            reduction=case["reduction"],
        )
        wrong += compare.difference("loss", loss, expected_loss, LIMIT)
        _scalar(expected_loss).backward()
        _scalar(loss).backward()
    grads, weights = colrow.full_grads(model), colrow.full_state_dict(model)
    if mesh.tp.rank == 0:
        wrong += compare.gradients("gradient of", grads, whole_gradients(whole), LIMIT)
        held = dict(whole.state_dict())
        for name, value in weights.items():
            if name in held and not torch.equal(value, held[name]):
                wrong.append(f"weight {name} is not the file's")
    return wrong


def _scalar(loss: Tensor) -> Tensor:
    return (
        loss
        if loss.dim() == 0
        else (loss * torch.linspace(0.5, 2, loss.numel()).view_as(loss)).sum()
    )


def _mask(case: Case) -> Tensor | None:
    """Row r has r padded positions, as far as its last one stays."""
    rows, length = case["rows"], case["length"]
    if case["mask"] == "none":
        return None
    mask = torch.ones(rows, length, dtype=torch.int64)
    if case["mask"] == "ones":
        return mask
    for row in range(1, rows):
        padded = min(2 * row - 1, length - 1)
        if case["mask"] == "left":
            mask[row, :padded] = 0
        elif padded:
            mask[row, -padded:] = 0
    return mask


def _labels(case: Case, ids: Tensor, mask: Tensor | None) -> Tensor:
    labels = ids.clone()
    if mask is not None:
        counts = mask.bool()
        counts[:, 1:] &= mask[:, :-1].bool()  # what padding would predict means nothing
        labels = labels.masked_fill(~counts, IGNORED)
    if case["ignored"] == "some":
        labels[:, 2::3] = IGNORED
    elif case["ignored"] == "row" and len(labels) > 1:
        labels[1] = IGNORED
    elif case["ignored"] == "all but one":
        labels[:, :-1] = IGNORED
        labels[1:] = IGNORED
    return labels


DECODER = Kind("decoder", fields, run, weight=3)
