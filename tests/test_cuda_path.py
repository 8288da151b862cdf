"""What of the CUDA path shows without a GPU: where its tensors are, and when the host waits."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.decoding import FixedCache
from benchmarks.gpu.shapes import shares
from colrow.comm import mesh as meshes
from colrow.comm import point_to_point, primitives
from colrow.comm.agreement import assert_on_device, different_seeds, require_same
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.generation.sampling import next_tokens
from colrow.models import compose
from colrow.models.build import from_config
from colrow.models.compose import fields_of
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.pipeline.runner import PipelineRunner
from colrow.planner.catalog import find_model
from tests import pretend_cuda
from tests.comm.test_point_to_point import check_messages
from tests.ranks import RankPool

NAMES = ("llama-3-8b", "gpt3-175b", "bloom-176b", "gpt-neox-20b", "qwen3-8b")


def tiny(name: str, **changes: Any) -> ModelConfig:
    fields = fields_of(find_model(name).config)
    smaller = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2 if fields["num_kv_heads"] < fields["num_heads"] else 4,
        "head_dim": 8,
        "ffn_size": 48,
        "max_positions": 32,
        "rope": fields["rope"] and replace(fields["rope"], dims=8),
        "windows": (),
    }
    return compose.decoder(**{**fields, **smaller, **changes})


def decoder(config: ModelConfig) -> Decoder:
    return from_config(config, dtype=torch.bfloat16, device="cuda:0")


@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_computed_without_the_host_waiting(name: str) -> None:
    """As a CUDA graph needs it; to choose the token the host reads whether logits are NaN."""
    with pretend_cuda.pretending(), torch.inference_mode():
        model = decoder(tiny(name)).eval()
        ids = torch.zeros(2, 1, dtype=torch.int64, device="cuda:0")
        growing = model.make_cache(2, 8)
        pretend_cuda.waits.clear()
        for cache in (FixedCache(model, 2, 5), growing, growing):
            logits = model.last_logits(ids, attention_mask=None, cache=cache)
            assert logits.is_cuda and logits.shape == (2, 64)
        assert pretend_cuda.waits == []
        next_tokens(logits, model.tp, model.vocab)
        assert len(pretend_cuda.waits) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_computed_without_the_host_waiting(name: str) -> None:
    """Dropout included, whose tables are made once."""
    dropout = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.1)
    with pretend_cuda.pretending():
        model = decoder(tiny(name, **dropout))
        ids = torch.ones(2, 6, dtype=torch.int64, device="cuda:0")
        pretend_cuda.waits.clear()
        model.loss(ids, ids).backward()
        assert pretend_cuda.waits == []
        assert all(p.grad is not None and p.grad.is_cuda for p in model.parameters())


def test_the_benchmarks_models_are_on_the_device() -> None:
    with pretend_cuda.pretending():
        for share in shares(small=True):
            tensors = [*decoder(share.config).parameters(), *decoder(share.config).buffers()]
            assert all(tensor.is_cuda for tensor in tensors)


def test_a_long_message_is_cut_to_what_a_gpus_assertion_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With several ranks every layer's constructor compares seeds so."""
    monkeypatch.setattr(primitives, "all_reduce", lambda x, *_, **__: x)
    tp = ParallelGroup.single()
    tp.size = 2
    message = different_seeds("initial weights", tp)
    assert len(message) > 255
    with pretend_cuda.pretending():
        gpu = torch.device("cuda", 0)
        for said in (message, "é" * 200):
            require_same(1, tp, said, layer="", device=gpu)
        with pytest.raises(RuntimeError, match="^" + re.escape(message[:250])):
            assert_on_device(torch.zeros((), dtype=torch.bool, device=gpu), message)


def check_messages_by_the_host(tp: ParallelGroup) -> None:
    """What Gloo gets of a GPU's tensors: copies in the host's memory."""
    through_host = point_to_point._through_host
    point_to_point._through_host = lambda x, tp: True
    try:
        check_messages(tp)
    finally:
        point_to_point._through_host = through_host
    assert tp.cuda_by_gloo


def test_messages_of_a_gpu_go_by_the_host_on_gloo(ranks: RankPool) -> None:
    ranks(2, check_messages_by_the_host)


def test_ranks_share_gpus_on_gloo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    places = [meshes._choose_device("cuda", "gloo", rank, 5) for rank in range(5)]
    assert [place.index for place in places] == [0, 1, 0, 1, 0] and places == chosen
    assert meshes._choose_device("cuda", None, 1, 2) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"local rank 2 has no GPU: 2 GPUs.*engine='gloo'"):
        meshes._choose_device("cuda", None, 2, 3)


def test_the_engine_in_use_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    both = "cpu:gloo,cuda:nccl"
    monkeypatch.setattr(meshes.dist, "get_backend", lambda: both)
    monkeypatch.setattr(meshes.dist, "get_backend_config", lambda: both)
    for device, name in (("cuda", "nccl"), ("cpu", "gloo")):
        assert meshes._engine_in_use(None, torch.device(device)).name == name


def test_a_pipeline_of_gpus_on_gloo_is_refused() -> None:
    pp = ParallelGroup.single("pp")
    pp.size, pp.cuda_by_gloo = 2, True
    mesh = Mesh(ParallelGroup.single(), ParallelGroup.single("dp"), pp, None, torch.device("cuda"))
    model: Any = SimpleNamespace(pipeline=SimpleNamespace(split=None))
    with pytest.raises(ValueError, match="Gloo does not take them from a GPU"):
        PipelineRunner(model, mesh, schedule="gpipe", microbatches=2, microbatch=1, sequence=4)
