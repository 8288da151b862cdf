"""Models that were split in place, behind the interface that the decoder has too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import colrow
from colrow.any_model.configuration import plain_tokens
from colrow.any_model.loading import load_model
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.models.interface import TensorParallelModel
from colrow.tiny_models.architectures import Architecture, build
from colrow.verification.comparison import relative_error
from colrow.verification.reference import full_precision
from tests.ranks import RankPool

pytestmark = pytest.mark.cpu_only("tiny models of transformers in fp64, on the CPU")
LIMIT = 1e-10


def batch() -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which some do not count."""
    ids = plain_tokens(97, 18, "cpu").view(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    return ids, labels


def check(tp: ParallelGroup, path: str, in_place: bool, expected: dict[str, Any]) -> str:
    single = ParallelGroup.single
    mesh = Mesh(tp, single("dp"), single("pp"), None, torch.device("cpu"))
    ids, labels = batch()
    model: TensorParallelModel = load_model(path, mesh, dtype=torch.float64, in_place=in_place)
    with full_precision():
        loss = model.loss(ids, labels)
        loss.backward()
        other = model.loss(ids, labels, reduction="sum", label_smoothing=0.1, z_loss=1e-3)
    assert relative_error(loss, expected["loss"]) < LIMIT
    assert relative_error(other, expected["other"]) < LIMIT
    grads = colrow.full_grads(model.module)
    if tp.rank == 0:
        for name, grad in expected["grads"].items():
            assert relative_error(grads[name], grad) < LIMIT, name
    shards = model.shards()
    for name, (parameter, spec) in shards.items():
        assert tuple(parameter.shape) == spec.local_shape(tp.rank), name
    held = sum(p.numel() * p.element_size() for p, _ in shards.values())
    assert model.weight_bytes_per_rank()[tp.rank] == held
    assert sum(model.vocabulary.sizes) == model.description.vocab_size == 97
    return model.description.kind


@pytest.mark.parametrize(
    ("name", "in_place"), [("gemma", False), ("mixtral", True), ("llama", False), ("llama", True)]
)
def test_loss_gradients_and_shards(
    name: str, in_place: bool, tmp_path: Path, ranks: RankPool
) -> None:
    whole: Any = build(Architecture(name)).eval()
    whole.save_pretrained(tmp_path)
    ids, labels = batch()
    with full_precision():
        result = whole(input_ids=ids, labels=labels, use_cache=False)
        result.loss.backward()
        logits = result.logits[:, :-1].flatten(0, 1).detach()
        targets = labels[:, 1:].flatten()
        other = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
        counted = logits[targets != -100]
        other = other + 1e-3 * counted.logsumexp(-1).square().sum()
    grads = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    expected = {"loss": result.loss.detach(), "other": other, "grads": grads}
    kinds = ranks(2, check, str(tmp_path), in_place, expected, timeout=240)
    assert kinds == ["decoder" if name == "llama" and not in_place else "in place"] * 2
