"""Every layer alone, with its dense counterpart: for checks that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow import (
    ColumnParallelLinear,
    GateUpParallelLinear,
    HeadPartition,
    LayerNorm,
    ParallelAttention,
    ParallelGroup,
    ParallelMLP,
    Partition,
    PositionEmbedding,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from colrow.layers.options import RopeConfig
from colrow.partition import ShardSpec
from colrow.sharding import Sharding
from tests.layers.dense import Weights, compare, divided, random
from tests.layers.test_attention import HEAD_DIM, DenseAttention, head_norm
from tests.layers.test_block import LLAMA, NEOX, dense_block, make_block
from tests.layers.test_mlp import dense_mlp

BATCH, SEQUENCE, IN, OUT, VOCABULARY, FFN = 2, 7, 12, 101, 97, 101
ROPE = RopeConfig(theta=100.0, dims=HEAD_DIM)
WHOLE = "held by all ranks"
BY_SEQUENCE = "divided by sequence"


@dataclass(frozen=True)
class Case:
    """A layer, its dense form, and how input and result are divided.

    Attributes:
        make: the layer for a group and a dtype.
        dense: see :func:`tests.layers.dense.compare`.
        features: of the input; None for token ids.
        x, y: WHOLE, BY_SEQUENCE, or the blocks that features are divided by, for a number of ranks.
        matmul: whether the result is a matmul's, which autocast narrows.
    """

    name: str
    make: Callable[[ParallelGroup, torch.dtype], nn.Module]
    dense: Callable[[Weights, Tensor], Tensor]
    features: int | None
    x: str | Callable[[int], list[Partition]] = WHOLE
    y: str | Callable[[int], list[Partition]] = WHOLE
    matmul: bool = True

    def input(self, dtype: torch.dtype) -> Tensor:
        if self.features is None:
            return torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) * 5 % 23
        return random(BATCH, SEQUENCE, self.features, dtype=dtype).requires_grad_()

    @property
    def takes_sequence(self) -> bool:
        return BY_SEQUENCE in (self.x, self.y) and "norm" not in self.name

    def compare(
        self,
        tp: ParallelGroup,
        layer: nn.Module,
        dtype: torch.dtype,
        *,
        call: Callable[..., Tensor] | None = None,
        dense: Callable[[Weights, Tensor], Tensor] | None = None,
        x_grad: bool = True,
        result_dtype: torch.dtype | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Against the dense form; ``call`` and ``dense`` instead of the layer and its own."""
        options = {"sequence": Partition.even(SEQUENCE, tp.size)} if self.takes_sequence else {}
        x = self.input(dtype)
        x.requires_grad_(x_grad and x.is_floating_point())
        compare(
            tp,
            layer,
            dense or self.dense,
            x,
            f"{self.name} {dtype}",
            x_spec=None if self.x == WHOLE else self._spec(x, self.x, tp.size),
            y_spec=None if self.y == WHOLE else lambda y: self._spec(y, self.y, tp.size),
            run=lambda x: (layer if call is None else call)(x, **options),
            result_dtype=result_dtype,
            tolerance=tolerance,
        )

    def _spec(self, x: Tensor, how: str | Callable[[int], list[Partition]], n: int) -> ShardSpec:
        if isinstance(how, str):
            return divided(x, -2, Partition.even(SEQUENCE, n))
        return divided(x, -1, *how(n))


def _linear(weights: Weights, x: Tensor) -> Tensor:
    return F.linear(x, weights["weight"], weights.get("bias"))


def _lookup(weights: Weights, ids: Tensor) -> Tensor:
    return F.embedding(ids, weights["weight"])


def _rms(weights: Weights, x: Tensor) -> Tensor:
    return F.rms_norm(x, (IN,), weights["weight"], 1e-5)


def _layer_norm(weights: Weights, x: Tensor) -> Tensor:
    return F.layer_norm(x, (IN,), weights["weight"], weights["bias"], 1e-5)


def _qkv_blocks(n: int) -> list[Partition]:
    heads = HeadPartition.create(9, 3, n)
    return [heads.query.scaled(4), heads.key_value.scaled(4), heads.key_value.scaled(4)]


def _even(*lengths: int) -> Callable[[int], list[Partition]]:
    return lambda n: [Partition.even(length, n) for length in lengths]


def _heads(q: int, kv: int, tp: ParallelGroup) -> HeadPartition:
    return HeadPartition.create(q, kv, tp.size)


CASES = [
    Case(
        "column",
        lambda tp, dtype: ColumnParallelLinear(IN, OUT, tp, bias=True, dtype=dtype),
        _linear,
        IN,
        y=_even(OUT),
    ),
    Case(
        "column without overlap",
        lambda tp, dtype: ColumnParallelLinear(
            IN, OUT, tp, bias=True, sharding=Sharding(overlap=False), dtype=dtype
        ),
        _linear,
        IN,
        y=_even(OUT),
    ),
    Case(
        "column, gathered",
        lambda tp, dtype: ColumnParallelLinear(
            IN, OUT, tp, bias=True, gather_output=True, dtype=dtype
        ),
        _linear,
        IN,
    ),
    Case(
        "column, sequence-parallel",
        lambda tp, dtype: ColumnParallelLinear(
            IN, OUT, tp, bias=True, sequence_parallel=True, dtype=dtype
        ),
        _linear,
        IN,
        x=BY_SEQUENCE,
        y=_even(OUT),
    ),
    Case(
        "column, gathering again",
        lambda tp, dtype: ColumnParallelLinear(
            IN,
            OUT,
            tp,
            bias=True,
            sharding=Sharding(True, keep_gathered_input=False),
            dtype=dtype,
        ),
        _linear,
        IN,
        x=BY_SEQUENCE,
        y=_even(OUT),
    ),
    Case(
        "row",
        lambda tp, dtype: RowParallelLinear(OUT, IN, tp, bias=True, dtype=dtype),
        _linear,
        OUT,
        x=_even(OUT),
    ),
    Case(
        "row of a whole input",
        lambda tp, dtype: RowParallelLinear(
            OUT, IN, tp, bias=True, input_is_parallel=False, dtype=dtype
        ),
        _linear,
        OUT,
    ),
    Case(
        "row, sequence-parallel",
        lambda tp, dtype: RowParallelLinear(
            OUT, IN, tp, bias=True, sequence_parallel=True, dtype=dtype
        ),
        _linear,
        OUT,
        x=_even(OUT),
        y=BY_SEQUENCE,
    ),
    Case(
        "qkv",
        lambda tp, dtype: QKVParallelLinear(IN, _heads(9, 3, tp), 4, tp, bias=True, dtype=dtype),
        _linear,
        IN,
        y=_qkv_blocks,
    ),
    Case(
        "gate and up",
        lambda tp, dtype: GateUpParallelLinear(
            IN, Partition.even(FFN, tp.size), tp, bias=False, dtype=dtype
        ),
        _linear,
        IN,
        y=_even(FFN, FFN),
    ),
    Case(
        "embedding",
        lambda tp, dtype: VocabParallelEmbedding(VOCABULARY, IN, tp, dtype=dtype),
        _lookup,
        None,
        matmul=False,
    ),
    Case(
        "embedding, sequence-parallel",
        lambda tp, dtype: VocabParallelEmbedding(
            VOCABULARY, IN, tp, sequence_parallel=True, dtype=dtype
        ),
        _lookup,
        None,
        y=BY_SEQUENCE,
        matmul=False,
    ),
    Case(
        "positions, sequence-parallel",
        lambda tp, dtype: PositionEmbedding(23, IN, tp, sequence_parallel=True, dtype=dtype),
        _lookup,
        None,
        y=BY_SEQUENCE,
        matmul=False,
    ),
    Case(
        "attention",
        lambda tp, dtype: ParallelAttention(
            IN,
            _heads(9, 3, tp),
            HEAD_DIM,
            tp,
            rope=ROPE,
            query_norm=head_norm(1e-5),
            key_norm=head_norm(1e-5),
            dtype=dtype,
        ),
        DenseAttention(9, 3, rope=ROPE, norm_eps=1e-5),
        IN,
    ),
    Case(
        "attention, sequence-parallel",
        lambda tp, dtype: ParallelAttention(
            IN,
            _heads(5, 1, tp),
            HEAD_DIM,
            tp,
            alibi=True,
            qkv_bias=True,
            output_bias=True,
            sequence_parallel=True,
            dtype=dtype,
        ),
        DenseAttention(5, 1, alibi=True),
        IN,
        x=BY_SEQUENCE,
        y=BY_SEQUENCE,
    ),
    Case(
        "mlp",
        lambda tp, dtype: ParallelMLP(IN, FFN, tp, dtype=dtype),
        dense_mlp("silu", gated=True),
        IN,
    ),
    Case(
        "block",
        lambda tp, dtype: make_block(tp, LLAMA, sp=False, dtype=dtype),
        lambda weights, x: dense_block(weights, x, LLAMA),
        IN,
        matmul=False,
    ),
    Case(
        "block, sequence-parallel",
        lambda tp, dtype: make_block(tp, NEOX, sp=True, dtype=dtype),
        lambda weights, x: dense_block(weights, x, NEOX),
        IN,
        x=BY_SEQUENCE,
        y=BY_SEQUENCE,
        matmul=False,
    ),
    Case(
        "rms norm of a shard",
        lambda tp, dtype: RMSNorm(IN, tp, eps=1e-5, applied_to="shard", dtype=dtype),
        _rms,
        IN,
        x=BY_SEQUENCE,
        y=BY_SEQUENCE,
        matmul=False,
    ),
    Case(
        "layer norm of a shard",
        lambda tp, dtype: LayerNorm(IN, tp, eps=1e-5, applied_to="shard", dtype=dtype),
        _layer_norm,
        IN,
        x=BY_SEQUENCE,
        y=BY_SEQUENCE,
        matmul=False,
    ),
]
