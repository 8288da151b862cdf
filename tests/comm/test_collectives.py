"""The collectives against plain tensor algebra on all ranks' data, which every rank knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from colrow import (
    Partition,
    copy_to_tp,
    gather_from_sequence,
    gather_from_tp,
    reduce_from_tp,
    reduce_scatter_to_sequence,
    scatter_to_sequence,
    scatter_to_tp,
)
from colrow.comm import primitives
from colrow.comm.agreement import require_same
from colrow.comm.collectives import all_to_all
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import record
from tests.devices import moved
from tests.layers.dense import raises
from tests.ranks import RankPool

# What a tensor is across ranks. "same": one tensor that every rank holds. "own": every rank has a
# tensor of the whole shape for itself. "shard": every rank has its range.
Kind = Literal["same", "own", "shard"]


@dataclass(frozen=True)
class Collective:
    """A collective, what its input and result are across ranks, and the divided dimension."""

    function: Callable[..., Tensor]
    input: Kind
    result: Kind
    dim: int | None

    def forward(self, inputs: list[Tensor], bounds: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """All ranks' results from all ranks' inputs."""
        if self.input == "same":
            whole = inputs[0]
        elif self.input == "own":
            whole = torch.stack(inputs).sum(0)
        else:
            assert self.dim is not None
            whole = torch.cat(inputs, self.dim)
        if self.result == "shard":
            assert self.dim is not None
            return [whole.narrow(self.dim, a, b - a) for a, b in bounds]
        return [whole] * len(inputs)


def gather_for_all(x: Tensor, tp: ParallelGroup, **options: Any) -> Tensor:
    """Where every rank has the whole gradient of the gathered sequence."""
    return gather_from_sequence(x, tp, partial_gradient=False, **options)


COLLECTIVES = [
    Collective(copy_to_tp, "same", "own", None),
    Collective(reduce_from_tp, "own", "same", None),
    Collective(gather_from_tp, "shard", "same", -1),
    Collective(scatter_to_tp, "same", "shard", -1),
    Collective(scatter_to_sequence, "same", "shard", -2),
    Collective(gather_from_sequence, "shard", "own", -2),
    Collective(gather_for_all, "shard", "same", -2),
    Collective(reduce_scatter_to_sequence, "own", "shard", -2),
]


def adjoint(c: Collective) -> Collective:
    """What backward computes: the collective with input and result exchanged."""
    return Collective(c.function, c.result, c.input, c.dim)


def data(
    kind: Kind, shape: tuple[int, ...], c: Collective, p: Partition, seed: int
) -> list[Tensor]:
    """Whole numbers, so that sums are exact in any order; by rank."""
    generator = torch.Generator().manual_seed(seed)

    def whole() -> Tensor:
        drawn = torch.randint(-8, 9, shape, generator=generator, device="cpu")
        return moved(drawn.double())

    if kind == "own":
        return [whole() for _ in range(p.parts)]
    tensor = whole()
    if kind == "same":
        return [tensor] * p.parts
    assert c.dim is not None
    return [tensor.narrow(c.dim, a, b - a) for a, b in p.bounds]


def partitions(length: int, n: int) -> list[Partition | None]:
    """Even, uneven, with an empty rank, and by default."""
    uneven = Partition.from_sizes([length - (n - 1), *[1] * (n - 1)])
    empty = Partition.from_sizes([*[0] * (n - 1), length])
    return [None, Partition.even(length, n), uneven, empty]


def check_values(tp: ParallelGroup) -> None:
    """Forward and backward of every collective, shape, division and dtype; exact equality."""
    n, me = tp.size, tp.rank
    for c in COLLECTIVES:
        for shape in ((12, 12), (2, 12, 12), (2, 7, 5)):
            divisions = [None] if c.dim is None else partitions(shape[c.dim], n)
            for division in divisions:
                p = division or Partition.even(shape[c.dim or -1], n)
                options = {} if division is None else {"partition": division}
                for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                    xs = data(c.input, shape, c, p, seed=1)
                    gs = data(c.result, shape, c, p, seed=2)
                    x = xs[me].to(dtype).clone().requires_grad_()
                    g = gs[me].to(dtype).clone()
                    kept = x.detach().clone(), g.clone()
                    y = c.function(x, tp, **options)
                    y.backward(g)
                    what = f"{c.function.__name__} {shape} {p} {dtype}"
                    assert x.grad is not None and y.dtype == x.grad.dtype == dtype, what
                    assert torch.equal(y.double(), c.forward(xs, p.bounds)[me]), what
                    expected = adjoint(c).forward(gs, p.bounds)[me]
                    assert torch.equal(x.grad.double(), expected), what
                    assert torch.equal(x.detach(), kept[0]) and torch.equal(g, kept[1]), what


def check_strides(tp: ParallelGroup) -> None:
    """Transposed, strided and expanded inputs and gradients."""
    n, me = tp.size, tp.rank
    for c in COLLECTIVES:
        shape = (3, 12, 12)
        p = Partition.from_sizes([12 - (n - 1), *[1] * (n - 1)])
        options = {} if c.dim is None else {"partition": p}
        xs, gs = data(c.input, shape, c, p, seed=3), data(c.result, shape, c, p, seed=4)
        expected_y = c.forward(xs, p.bounds)[me]
        for make in (_transposed, _strided):
            x = make(xs[me]).requires_grad_()
            y = c.function(x, tp, **options)
            assert torch.equal(y, expected_y), c
            y.backward(make(gs[me]))
            assert x.grad is not None
            assert torch.equal(x.grad, adjoint(c).forward(gs, p.bounds)[me]), c
        x = xs[me].clone().requires_grad_()
        c.function(x, tp, **options).sum().backward()  # the gradient is an expanded scalar
        ones = [torch.ones_like(g) for g in gs]
        assert x.grad is not None and torch.equal(x.grad, adjoint(c).forward(ones, p.bounds)[me])


def _transposed(x: Tensor) -> Tensor:
    return x.detach().mT.contiguous().mT


def _strided(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x.detach()
    return wide[..., ::2]


def inner_products(tp: ParallelGroup) -> list[tuple[str, float, float]]:
    """This rank's part of <f(x), y> and <x, f^T(y)>; what all ranks hold counts on rank 0."""
    found = []
    for c in COLLECTIVES:
        p = Partition.from_sizes([7, *[2] * (tp.size - 1)])
        shape = (3, p.length, p.length)
        options = {} if c.dim is None else {"partition": p}
        x = data(c.input, shape, c, p, seed=5)[tp.rank].clone().requires_grad_()
        y = data(c.result, shape, c, p, seed=6)[tp.rank]
        fx = c.function(x, tp, **options)
        fx.backward(y)
        assert x.grad is not None
        counts = {"same": float(tp.rank == 0), "own": 1.0, "shard": 1.0}
        left = (fx * y).sum().item() * counts[c.result]
        right = (x * x.grad).sum().item() * counts[c.input]
        found.append((c.function.__name__, left, right))
    return found


def check_compiled(tp: ParallelGroup) -> None:
    """One graph without a break, forward and backward, at even and uneven division."""
    for c in COLLECTIVES:
        torch._dynamo.reset()
        p = Partition.from_sizes([3, *[2] * (tp.size - 1)])
        shape = (2, p.length, p.length)
        options = {} if c.dim is None else {"partition": p}

        def step(x: Tensor, c: Collective = c, options: dict = options) -> Tensor:  # type: ignore[type-arg]
            return c.function(x * 2, tp, **options) * 3

        xs, gs = data(c.input, shape, c, p, seed=7), data(c.result, shape, c, p, seed=8)
        x = xs[tp.rank].clone().requires_grad_()
        y = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        y.backward(gs[tp.rank])
        assert x.grad is not None
        assert torch.equal(y, 6 * c.forward(xs, p.bounds)[tp.rank]), c
        assert torch.equal(x.grad, 6 * adjoint(c).forward(gs, p.bounds)[tp.rank]), c


def check_refusals(tp: ParallelGroup) -> None:
    """Every rank raises before anything is sent."""
    x = torch.zeros(2, 6, 6)
    six = Partition.even(6, tp.size)
    for scatter in (scatter_to_tp, scatter_to_sequence, reduce_scatter_to_sequence):
        with raises(ValueError, "should be 7, not 6"):
            scatter(x, tp, partition=Partition.even(7, tp.size))
        with raises(ValueError, f"over {tp.size + 1} ranks", f"tp group of {tp.size}"):
            scatter(x, tp, partition=Partition.even(6, tp.size + 1))
    for gather in (gather_from_tp, gather_from_sequence):
        with raises(ValueError, f"should be {six.size(tp.rank)}, not 6"):
            gather(x, tp, partition=six)
        with raises(ValueError, f"over {tp.size - 1} ranks", f"tp group of {tp.size}"):
            gather(x, tp, partition=Partition.even(6, tp.size - 1))
        with raises(ValueError, "side by side"):
            gather(x, tp, partition=Partition.replicated(6, tp.size))


def check_primitives(tp: ParallelGroup) -> None:
    """The forms without autograd: maximum, in place, and asynchronous."""
    mine = torch.tensor([1.0, -2.0]) * (tp.rank + 1)
    assert primitives.all_reduce(mine, tp, op="max").tolist() == [tp.size, -2.0]
    total = tp.size * (tp.size + 1) / 2
    buffer = mine.clone()
    pending = primitives.all_reduce_async(buffer, tp, in_place=True)
    result = pending.wait()
    assert result is buffer and buffer.tolist() == [total, -2 * total]
    strided = torch.stack([mine, mine], 1)[:, 0]
    assert primitives.all_reduce(strided, tp, in_place=True).tolist() == [total, -2 * total]
    integers = torch.tensor([[tp.rank]])
    assert primitives.all_gather(integers, tp, 1).tolist() == [list(range(tp.size))]
    gathering = primitives.all_gather_async(integers, tp, 0)
    scattering = primitives.reduce_scatter_async(torch.arange(tp.size) * 1.0, tp, 0)
    assert scattering.wait().tolist() == [tp.rank * tp.size]
    assert gathering.wait().flatten().tolist() == list(range(tp.size))


def check_agreement(tp: ParallelGroup) -> None:
    """One value in which the ranks differ is enough, whatever it is. A GPU would only assert it."""
    cpu = torch.device("cpu")
    for value in (0, -1, 2**63 - 1, -(2**63)):
        require_same(value, tp, "differ", layer="", device=cpu)
        require_same(torch.tensor(value, device=cpu), tp, "differ", layer="", device=cpu)
        for other in range(tp.size):
            mine = value ^ (tp.rank == other)
            with raises(ValueError, "differ"):
                require_same(mine, tp, "differ", layer="", device=cpu)


def check_no_second_derivative(tp: ParallelGroup) -> None:
    """Differentiating a backward is refused: what it sends has no derivative."""
    for c in COLLECTIVES:
        p = Partition.even(6, tp.size)
        x = data(c.input, (6, 6), c, p, seed=1)[tp.rank].clone().requires_grad_()
        y = c.function(x, tp).square().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        with raises(RuntimeError, "once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_forward_and_backward_are_the_algebra(ranks: RankPool, n: int) -> None:
    ranks(n, check_values)
    ranks(n, check_strides)
    ranks(n, check_primitives)
    ranks(n, check_agreement)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_backward_is_the_adjoint(ranks: RankPool, n: int) -> None:
    for rows in zip(*ranks(n, inner_products), strict=True):
        left, right = sum(row[1] for row in rows), sum(row[2] for row in rows)
        assert left == right != 0, rows[0][0]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.cpu_only("Gloo cannot gather a GPU's tensors in a compiled graph")
def test_compiled_in_one_graph(ranks: RankPool, n: int) -> None:
    ranks(n, check_compiled)


def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    ranks(3, check_refusals)


def test_second_derivatives_are_refused(ranks: RankPool) -> None:
    ranks(2, check_no_second_derivative)


def test_one_rank_needs_no_process_group() -> None:
    tp = ParallelGroup.single()
    assert not torch.distributed.is_initialized()
    x = torch.ones(2, 3, requires_grad=True)
    for c in COLLECTIVES:
        assert c.function(x, tp) is x
    for primitive in (primitives.all_gather, primitives.reduce_scatter):
        assert primitive(x, tp, 0) is x
    assert primitives.all_reduce(x, tp) is x


def check_rows(tp: ParallelGroup) -> None:
    """Uneven numbers of rows, none among them; forward, backward, and what the ledger has."""
    n, me = tp.size, tp.rank
    counts = [[(2 * source + to) % 4 for to in range(n)] for source in range(n)]
    received = [counts[source][me] for source in range(n)]

    def piece(source: int, to: int, seed: int) -> Tensor:
        """What one rank sends another: whole numbers that no other pair has."""
        start = 1000 * seed + 100 * source + 10 * to
        return moved(torch.arange(start, start + counts[source][to]).double()[:, None, None])

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.cat([piece(me, to, 0) for to in range(n)]).expand(-1, 2, 3).to(dtype)
        x = x.clone().requires_grad_()
        with record(tp) as ledger:
            y = all_to_all(x, tp, sent=counts[me], received=received, layer="rows")
            expected = torch.cat([piece(source, me, 0) for source in range(n)])
            assert torch.equal(y, expected.expand(-1, 2, 3).to(dtype)), dtype
            y.backward(
                torch.cat([piece(source, me, 1) for source in range(n)]).expand_as(y).to(dtype)
            )
        back = torch.cat([piece(me, to, 1) for to in range(n)])
        assert x.grad is not None and torch.equal(x.grad, back.expand(-1, 2, 3).to(dtype)), dtype
        calls = [(c.op, c.phase, c.layer, c.bytes) for c in ledger.calls]
        if n > 1:
            width = 6 * x.element_size()
            assert calls == [
                ("all_to_all", "forward", "rows", width * sum(counts[me])),
                ("all_to_all", "backward", "rows", width * sum(received)),
            ]
    with raises(ValueError, "should add up to the rows"):
        all_to_all(x.detach(), tp, sent=[9] * n, received=received)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_rows_reach_the_ranks_that_they_are_for(ranks: RankPool, n: int) -> None:
    ranks(n, check_rows)
