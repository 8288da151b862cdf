"""Every layer alone in one graph: the numbers of the dense layer, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colrow import ParallelDropout, ParallelGroup, Partition, vocab_parallel_cross_entropy
from tests.layers.catalogue import CASES
from tests.layers.dense import assert_close, random
from tests.ranks import RankPool


def compiled(function: Callable[..., Tensor], backend: str = "aot_eager") -> Callable[..., Tensor]:
    torch._dynamo.reset()
    result: Callable[..., Tensor] = torch.compile(function, fullgraph=True, backend=backend)
    return result


def check_layers(tp: ParallelGroup) -> None:
    for case in CASES:
        layer = case.make(tp, torch.float64)
        case.compare(tp, layer, torch.float64, call=compiled(layer))


def check_inductor(tp: ParallelGroup) -> None:
    (case,) = (case for case in CASES if case.name == "mlp")
    layer = case.make(tp, torch.float32)
    case.compare(tp, layer, torch.float32, call=compiled(layer, "inductor"))


def check_functions(tp: ParallelGroup) -> None:
    """The loss and dropout, which gets its key as a tensor."""
    vocabulary = Partition.even(97, tp.size)
    start, stop = vocabulary.bounds[tp.rank]
    labels = torch.arange(10).view(2, 5) * 9
    labels[0, 1] = -100

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(
            logits, labels, tp, partition=vocabulary, label_smoothing=0.1, z_loss=1e-3
        )

    results = []
    for function in (loss, compiled(loss)):
        logits = random(2, 5, 97)[..., start:stop].clone().requires_grad_()
        value = function(logits, labels)
        value.backward()
        assert logits.grad is not None
        results.append((value.detach(), logits.grad))
    assert_close(results[1][0], results[0][0], 1e-14, "loss")
    assert_close(results[1][1], results[0][1], 1e-14, "gradient of the loss")

    dropout = ParallelDropout(0.3)

    def drop(x: Tensor, key: Tensor) -> Tensor:
        return dropout(x, key=key, dim=1, partition=vocabulary, rank=tp.rank)

    x, key = random(4, vocabulary.size(tp.rank)), torch.tensor(5)
    assert torch.equal(compiled(drop)(x, key), drop(x, key))


@pytest.mark.cpu_only("Gloo cannot gather a GPU's tensors in a compiled graph")
def test_in_one_graph(ranks: RankPool) -> None:
    ranks(2, check_layers, timeout=240)
    ranks(2, check_functions, timeout=120)


@pytest.mark.slow
@pytest.mark.cpu_only("Gloo cannot gather a GPU's tensors in a compiled graph")
def test_with_inductor(ranks: RankPool) -> None:
    ranks(2, check_inductor, timeout=240)
