"""Sequence parallelism of models that are split in place, against the whole models."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.inplace.analysis import analyse
from colrow.tiny_models.architectures import architectures, build
from colrow.tiny_models.example_batch import batch
from colrow.verification.comparison import gradient_errors, relative_error
from colrow.verification.reference import full_precision
from tests.inplace.test_parallelize import mesh_of
from tests.ranks import RankPool

LIMIT = 1e-12


def check_architecture(tp: ParallelGroup, name: str) -> tuple[Counter[tuple[str, str]], list[int]]:
    """The collectives of a step between embedding and head, and the lengths that norms saw."""
    architecture = architectures([name])[0]
    whole, model = build(architecture), build(architecture)
    colrow.parallelize(model, mesh_of(tp), sequence_parallel=True)
    inputs = batch(architecture, whole)
    lengths = []
    for module in model.modules():
        if "colrow_tokens" in vars(module):
            module.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    with full_precision():
        expected = whole(**inputs)
        with colrow.record(tp) as ledger:
            got = model(**inputs)
            expected.loss.backward()
            got.loss.backward()
        with torch.no_grad():
            assert relative_error(model(**inputs).logits, expected.logits) < LIMIT
    grads = colrow.full_grads(model)
    if tp.rank == 0:
        theirs = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        assert max(gradient_errors(grads, theirs).values()) < 1e-10
    inside = [call for call in ledger.calls if ".layers" in call.layer]
    return Counter((call.op, call.phase) for call in inside), lengths


def test_a_block_sends_two_gathers_and_two_scatters(ranks: RankPool) -> None:
    results = ranks(3, check_architecture, "llama")
    for calls, _ in results:
        blocks = 2
        # And one gather where the blocks begin or end; one all-reduce for each norm's gradient.
        assert calls["all_gather", "forward"] == 2 * blocks + 1
        assert calls["reduce_scatter", "forward"] == 2 * blocks
        assert calls["all_gather", "backward"] == 2 * blocks + 1
        assert calls["reduce_scatter", "backward"] == 2 * blocks
        assert calls["all_reduce", "forward"] == 0
        assert calls["all_reduce", "backward"] == 2 * blocks
    assert [lengths[0] for _, lengths in results] == [4, 4, 3]
    assert all(len(set(lengths)) == 1 for _, lengths in results)


# Results written into, and residuals as arguments; biases and dropout; experts; two stacks.
@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt2", "mixtral", "t5 (encoder-decoder)"])
def test_transformers_models(ranks: RankPool, name: str) -> None:
    for _, lengths in ranks(2, check_architecture, name):
        assert set(lengths) < {5, 6}


def check_generation(tp: ParallelGroup) -> None:
    architecture = architectures(["llama"])[0]
    whole: Any = build(architecture)
    model: Any = colrow.parallelize(build(architecture), mesh_of(tp), sequence_parallel=True)
    ids = batch(architecture, whole)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))
    with pytest.raises(ValueError, match="output_hidden_states: with sequence_parallel"):
        model(ids, output_hidden_states=True)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing of a model that was split"):
        model.train()(ids)


def test_generation_and_what_is_refused(ranks: RankPool) -> None:
    ranks(2, check_generation)


class Block(nn.Module):
    """A norm, an MLP and a residual, and something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(8)
        if kind == "flat":
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        else:
            self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        dropouts = {"dropout": nn.Dropout, "tokens": nn.Dropout1d, "alpha": nn.AlphaDropout}
        self.dropout = dropouts.get(kind, nn.Dropout)(0.3 if kind in dropouts else 0.0)
        if kind == "layer":
            self.extra = nn.Linear(8, 8)
        if kind == "scale":
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        if self.kind == "mean":
            y = y - x.mean(1, keepdim=True)
        if self.kind == "position":
            y = y + torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        if self.kind == "gradient":
            y = y + (x - x.detach()).sum(1, keepdim=True)
        if self.kind == "layer":
            y = self.extra(y)
        if self.kind == "scale":
            y = y * self.scale
        if self.kind == "flat":  # its split layers are its own, with no module around them
            return x + self.dropout(self.down(self.up(y).tanh()))
        result: Tensor = x + self.dropout(self.mlp(y))
        return result - x.mean(1, keepdim=True) if self.kind == "end" else result


class Blocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList([Block(kind), Block(kind)])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
            if self.kind == "between":
                x = x * 2
        return x


IDS = torch.arange(14).view(2, 7) % 13


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mean", "input of mlp depends on other tokens"),
        ("position", "input of mlp depends on other tokens"),
        ("end", "its result for a token depends on other tokens"),
        ("gradient", "the gradient of x is not made of the tokens' own"),
        ("layer", "extra is split by its output features"),
        ("alpha", "it drops out by alpha_dropout, which does more than multiply"),
        ("between", "blocks.1 is not given just what blocks.0 gave"),
    ],
)
def test_blocks_whose_tokens_hang_together(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"sequence_parallel: .*{reason}"):
        analyse(Blocks(kind).double(), 2, "auto", {"ids": IDS}, sequence_parallel=True)


def test_more_ranks_than_tokens_in_the_example() -> None:
    with pytest.raises(ValueError, match="2 tokens for 3 ranks: give example_inputs with more"):
        analyse(Blocks("plain"), 3, "auto", {"ids": IDS[:, :2]}, sequence_parallel=True)


def test_a_model_without_blocks() -> None:
    model = Block("plain")
    example = {"x": torch.randn(2, 6, 8)}
    with pytest.raises(ValueError, match="Block has no stack of blocks with split layers"):
        analyse(model, 2, "auto", example, sequence_parallel=True)


def check_own(tp: ParallelGroup, kind: str) -> None:
    torch.manual_seed(0)
    whole, model = Blocks(kind).double(), Blocks(kind).double()
    model.load_state_dict(whole.state_dict())
    colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": IDS}, sequence_parallel=True)
    lengths: list[int] = []
    norm = model.get_submodule("blocks.1.norm")
    norm.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    for length in (7, 5, 1):
        torch.manual_seed(length)
        expected = whole(IDS[:, :length])
        torch.manual_seed(length)
        got = model(IDS[:, :length])
        assert relative_error(got, expected) < LIMIT
        model.zero_grad()
        whole.zero_grad()
        expected.square().sum().backward()
        got.square().sum().backward()
        grads = colrow.full_grads(model)
        if tp.rank == 0:
            theirs = {n: p.grad for n, p in whole.named_parameters()}
            assert max(relative_error(grads[n], g) for n, g in theirs.items()) < LIMIT
    assert lengths == ([4, 3, 1] if tp.rank == 0 else [3, 2, 1])


# Dropout of what every rank has part of is that of the whole model.
@pytest.mark.parametrize("kind", ["scale", "dropout", "tokens", "flat"])
def test_a_model_of_ones_own_with_any_number_of_tokens(ranks: RankPool, kind: str) -> None:
    ranks(2, check_own, kind)
