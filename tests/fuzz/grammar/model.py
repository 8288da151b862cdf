"""A whole model out of blocks, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.case import Case, Fields, OneOf, Several
from tests.fuzz.grammar.blocks import BLOCKS, HEADS, HOW
from tests.fuzz.grammar.steps import STEPS

VOCABULARY = 23

BLOCK = Fields(
    {
        "block": OneOf(list(BLOCKS)),
        "ffn": OneOf([8, 12, 6, 13, 5, 24, 9]),
        "steps": Several(OneOf(list(STEPS)), most=3),
        "how": OneOf(HOW),
        "bias": OneOf([True, False]),
        "inline": OneOf([False, True]),
        "heads": OneOf(HEADS),
        "head_dim": OneOf([4, 3, 6]),
        "style": OneOf([0, 1, 2, 3, 4, 5]),
    }
)
MODEL = {
    "width": OneOf([8, 12, 10]),
    "input": OneOf(["features", "ids"]),
    "blocks": Several(BLOCK, most=3, least=1),
    "norm": OneOf(["none", "layer", "rms", "after"]),
    "residual": OneOf([True, False]),
    "reuse": OneOf([False, True]),
    "head": OneOf(["none", "linear", "tied"]),
    "result": OneOf(["tensor", "dict", "list", "nested"]),
}


class Model(nn.Module):
    """The model that a case describes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width, self.case = case["width"], case
        self.embedding = nn.Embedding(VOCABULARY, width) if case["input"] == "ids" else None
        self.blocks = nn.ModuleList([BLOCKS[b["block"]](width, b) for b in case["blocks"]])
        norm = {
            "none": nn.Identity,
            "layer": nn.LayerNorm,
            "rms": nn.RMSNorm,
            "after": nn.LayerNorm,
        }
        self.norms = nn.ModuleList([norm[case["norm"]](width) for _ in case["blocks"]])
        self.head = None
        if case["head"] != "none":
            self.head = nn.Linear(width, VOCABULARY, bias=case["head"] == "linear")
            if case["head"] == "tied" and self.embedding is not None:
                self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Any:
        if self.embedding is not None:
            x = self.embedding(x)
        for _ in range(2 if self.case["reuse"] else 1):
            for block, norm in zip(self.blocks, self.norms, strict=True):
                if self.case["norm"] == "after":
                    x = norm(x + block(x))
                elif self.case["residual"]:
                    x = x + block(norm(x))
                else:
                    x = block(norm(x))
        y = x if self.head is None else self.head(x)
        if self.case["result"] == "dict":
            return {"y": y, "hidden": x}
        if self.case["result"] == "list":
            return [y, x]
        return (y, {"inside": [x]}) if self.case["result"] == "nested" else y


def build(case: Case, seed: int = 0) -> nn.Module:
    """The model in fp64; the same values at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            model = Model(case)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        finally:
            torch.set_default_dtype(before)
    return model.double()


def batch(case: Case, seed: int, rows: int, length: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Keyword arguments for the model."""
    source = torch.Generator().manual_seed(seed)
    if case["input"] == "ids":
        return {"x": torch.randint(0, VOCABULARY, (rows, length), generator=source)}
    values = torch.randn(rows, length, case["width"], generator=source, dtype=torch.float64)
    return {"x": values * scale}
