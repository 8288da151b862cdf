"""Ranks that give a split model different things: an error on all of them, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from colrow.inplace.apply.digest import digest_of
from colrow.tiny_models.architectures import Architecture, build
from colrow.tiny_models.example_batch import batch
from tests.inplace.test_parallelize import OwnModel, mesh_of
from tests.ranks import RankPool

MESSAGE = "were given different batches"


def refused(call: Callable[[], Any], match: str = MESSAGE) -> str:
    with pytest.raises(ValueError, match=match) as error:
        call()
    return str(error.value)


def compared(tp: ParallelGroup, call: Callable[[], Any]) -> list[int]:
    """Bytes of each comparison during a call."""
    with record(tp) as ledger:
        call()
    return [c.bytes for c in ledger.calls if c.layer == "inputs"]


def check_transformers(tp: ParallelGroup) -> None:
    model: Any = build(Architecture("llama"))
    given = batch(Architecture("llama"), model)
    colrow.parallelize(model, mesh_of(tp))
    model.train()
    rank, ids = tp.rank, given["input_ids"]
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + rank) % 20
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
    vectors = model.get_input_embeddings()(ids).detach()
    loss = model(input_ids=ids, labels=ids).loss
    cut = ids[:, : ids.shape[1] - rank]
    half = torch.ones_like(mask)
    half[0, :rank] = 0
    assert "(input_ids)" in refused(lambda: model(input_ids=other, labels=ids))
    assert "(labels)" in refused(lambda: model(input_ids=ids, labels=other))
    assert "(attention_mask)" in refused(lambda: model(ids, attention_mask=half))
    assert "(position_ids)" in refused(lambda: model(ids, position_ids=positions + rank))
    assert "(inputs_embeds)" in refused(lambda: model(inputs_embeds=vectors * (1 + 1e-15 * rank)))
    assert "which are given" in refused(lambda: model(ids, labels=ids if rank else None))
    refused(lambda: model(cut))  # another shape
    refused(lambda: model(ids, use_cache=bool(rank)))
    refused(lambda: model(ids, output_hidden_states=bool(rank)))
    refused(lambda: model.model(other))
    refused(lambda: model.model(ids, attention_mask=half))
    refused(lambda: model.model.layers[0].mlp(vectors * (1 + rank)))
    refused(lambda: model.lm_head(vectors + rank))
    with torch.no_grad() if rank else nullcontext():
        assert "mode" in refused(lambda: model(ids, labels=ids))
    model.train(bool(rank))
    assert "mode" in refused(lambda: model(ids))
    model.train()
    model.model.layers[1].train(bool(rank))
    assert "mode" in refused(lambda: model(ids))
    model.train()
    model.config.use_cache = bool(rank)
    assert "settings" in refused(lambda: model(ids))
    model.config.use_cache = True
    # What is the same is accepted, however it is given; nothing was left half-sent.
    assert model(**({"input_ids": ids} if rank else {"input_ids": ids, "attention_mask": None}),
                 labels=ids).loss == loss  # fmt: skip
    assert compared(tp, lambda: model(ids) if rank else model(input_ids=ids)) == [32]
    hidden = model.model(ids).last_hidden_state
    assert compared(tp, lambda: model.lm_head(hidden)) == [32]
    model.gradient_checkpointing_enable()
    assert compared(tp, lambda: model(ids, labels=ids).loss.backward()) == [32]
    model.gradient_checkpointing_disable()
    model.eval()
    options = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    assert compared(tp, lambda: model.generate(ids, do_sample=False, **options)) == [32] * 3
    refused(lambda: model.generate(other, do_sample=False, **options))
    torch.manual_seed(rank)
    refused(lambda: model.generate(ids, do_sample=True, **options | {"max_new_tokens": 20}))
    model.check_inputs = False
    assert compared(tp, lambda: model(other)) == []


def test_a_model_of_transformers(ranks: RankPool) -> None:
    ranks(2, check_transformers)


class Nested(OwnModel):
    """Takes its tokens from within a container, and drops some."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, given: Any, state: Any = None, *, options: Any = None) -> Any:  # type: ignore[override]
        return super().forward(self.dropout(given["ids"][0].double()).long() % 31)


def check_own(tp: ParallelGroup) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (2, 7))
    model = Nested().double().eval()
    colrow.parallelize(model, mesh_of(tp), example_inputs={"given": {"ids": [ids]}})
    other = ids.clone()
    other[1, 3] = (ids[1, 3] + tp.rank) % 31
    refused(lambda: model({"ids": [other]}))
    refused(lambda: model(given={"ids": (other,)}))
    refused(lambda: model({"ids": [ids]}, options={"a": 1, "b": {"c": [tp.rank]}}))
    refused(lambda: nn.Sequential(model)({"ids": [other]}))
    state = model({"ids": [ids]}, options={"a": object()}).detach()
    model({"ids": [ids]}, state + tp.rank)
    refused(lambda: model({"ids": [ids]}, options=[state + tp.rank]))
    result = model({"ids": [ids]})
    result.data += tp.rank  # what the model gave may come back, with a rank's own rounding
    model({"ids": [ids]}, options=[result])
    model.train()
    model({"ids": [ids]})
    torch.manual_seed(tp.rank)
    refused(lambda: model({"ids": [ids]}), "would draw different dropout masks")
    model.eval()({"ids": [ids]})  # nothing is drawn
    calls = compared(tp, lambda: torch.compile(model, backend="eager")({"ids": [ids]}))
    assert calls == []  # as the decoder's
    torch.manual_seed(0)
    off = colrow.parallelize(
        OwnModel(), mesh_of(tp), example_inputs={"ids": ids}, check_inputs=False
    )
    assert compared(tp, lambda: off(other)) == []
    off.check_inputs = True  # type: ignore[assignment]
    refused(lambda: off(other))


def test_a_model_of_ones_own(ranks: RankPool) -> None:
    ranks(3, check_own)


def test_digests() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    same = [x, x.clone(), x.t().contiguous().t(), nn.Parameter(x).detach()]
    assert len({digest_of(value, {}) for value in same}) == 1
    different: list[Any] = [
        x, -x, x.t(), x.float(), x.view(4, 3), x.flip(0), [x], [x, x], (x, None), x + 1e-15,
        torch.complex(x, x), x.bfloat16(), x.to(torch.uint8), x > 0, {"a": x}, {"b": x},
        torch.tensor(0.0), torch.tensor(-0.0), torch.tensor(False), 0, False, "0", 0.0, -0.0,
        x.numpy() + 1, torch.nested.nested_tensor([x, x[:1]]), torch.zeros(0), torch.zeros(0, 1),
        None, {1, 2}, {1, 3}, range(3), x.to("meta"),
    ]  # fmt: skip
    assert len({digest_of(value, {}) for value in different}) == len(different)
    assert digest_of({"b": 1, "a": [2]}, {}) == digest_of({"a": [2], "b": 1}, {})
    known = {id(x): x}
    assert digest_of([x], known) != digest_of([x], {})
    y: Tensor = x * 2
    assert digest_of([x], known) == digest_of([y], {id(y): y})
