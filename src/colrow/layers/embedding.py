"""An embedding whose vocabulary is divided over ranks (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow import rng
from colrow.comm import collectives, primitives
from colrow.comm.agreement import common_seed
from colrow.comm.group import ParallelGroup
from colrow.layers.describe import EmbeddingSpec, TableSpec
from colrow.layers.described import Described
from colrow.layers.linear import Sharded
from colrow.layers.quantised import QuantisedWeight
from colrow.layers.shared import SharedWeights
from colrow.partition import Partition
from colrow.sharding import SequenceDivision, Sharding


class VocabParallelEmbedding(Sharded, Described):
    """Looks tokens up where they are held; the sum over ranks is the embedding.

    =================  ===============================  =========================================
    .                  without sequence parallelism     with sequence parallelism
    =================  ===============================  =========================================
    token ids          ``[..., sequence]`` int64, the   the same
                       same on every rank
    result             ``[..., sequence, dim]``         ``[..., sequence_local, dim]``
    forward sends      all-reduce                       reduce-scatter
    backward sends     nothing                          all-gather
    =================  ===============================  =========================================

    Args:
        num_embeddings: global vocabulary size.
        embedding_dim: size of a vector.
        tp: the tensor-parallel group.
        partition: how the vocabulary is divided; as evenly as possible by default.
        padding_idx: a token whose vector gets no gradient, as in nn.Embedding.
        sequence_parallel: whether the result is a shard of the sequence.
        sharding: the same as a value that is handed down, see :class:`colrow.Sharding`.
        layer: name for messages and the ledger.

    Parameters: ``weight`` ``[vocab_local, dim]``, standard normal, the same at any tp size. All
    ranks must construct the layer after the same torch CPU seed; they compare it with an all-reduce
    of 16 bytes (nothing on the meta device).

    Raises:
        ValueError: a padding index outside the vocabulary; a partition of something else, or that
            leaves a rank without a token; ranks with different seeds.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tp: ParallelGroup,
        *,
        partition: Partition | None = None,
        padding_idx: int | None = None,
        sequence_parallel: bool = False,
        sharding: Sharding | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx={padding_idx} is outside 0 to {num_embeddings - 1}")
        partition = partition or Partition.even(num_embeddings, tp.size)
        if partition.length != num_embeddings or partition.parts != tp.size:
            raise ValueError(
                f"num_embeddings={num_embeddings} on {tp.size} ranks, but the partition divides "
                f"{partition.length} over {partition.parts}"
            )
        primitives.check_split(partition, tp)
        if 0 in partition.sizes:
            raise ValueError(
                f"num_embeddings={num_embeddings} leaves a rank without any: the sizes are "
                f"{list(partition.sizes)}"
            )
        spec = EmbeddingSpec(partition, embedding_dim)
        super().__init__(spec, tp, layer=layer, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.partition = partition
        self.sharding = Sharding.of(sharding, sequence_parallel)
        start, stop = partition.bounds[tp.rank]
        held = padding_idx is not None and start <= padding_idx < stop
        self._local_padding = padding_idx - start if padding_idx is not None and held else None
        _draw_(self, "embedding")

    def forward(self, token_ids: Tensor, *, sequence: SequenceDivision = None) -> Tensor:
        """The vectors of these tokens.

        Args:
            sequence: under sequence parallelism, how the sequence is divided; evenly by default.
                WHOLE asks for a result that is whole on every rank.

        Raises:
            ValueError: when a token id is outside the vocabulary. (On CUDA and under torch.compile
                the device asserts this later, since raising here would stall it.)
        """
        check_range(token_ids, self.num_embeddings, "token id")
        if self.tp.size == 1:
            return self._vectors(token_ids)
        start, stop = self.partition.bounds[self.tp.rank]
        elsewhere = (token_ids < start) | (token_ids >= stop)
        index = (token_ids - start).masked_fill(elsewhere, 0)
        local = self._vectors(index)
        local = local.masked_fill(elsewhere.unsqueeze(-1), 0)
        divided = self.divided_sequence(
            sequence, lambda: Partition.even(local.shape[-2], self.tp.size)
        )
        if divided is None:
            return collectives.reduce_from_tp(local, self.tp, layer=self.layer)
        return collectives.reduce_scatter_to_sequence(
            local, self.tp, partition=divided, layer=self.layer
        )

    def _vectors(self, index: Tensor) -> Tensor:
        if isinstance(self.weight, QuantisedWeight):
            return self.weight.vectors(index)
        return F.embedding(index, self.weight, self._local_padding)

    def extra_repr(self) -> str:
        """Rank, global and local shape."""
        local = list(self.weight.shape)
        return (
            f"weight={list(self.weight_spec.shape)}, local={local}, "
            f"tp_rank={self.tp.rank}/{self.tp.size}"
        )


def _draw_(layer: Described, stream: str) -> None:
    """Standard normal vectors, the same at any tp size; the ranks compare seeds. Not on meta."""
    if layer.weight.is_meta:
        return
    seed = common_seed("initial weights", layer.tp, layer=layer.layer, device=layer.weight.device)
    key = rng.stream_key(seed, stream)
    rng.fill_shard_(layer.weight, layer.weight_spec, layer.tp.rank, lambda at: rng.normal(key, at))


def check_range(ids: Tensor, length: int, what: str, *, ignore: int | None = None) -> None:
    """Raises ValueError when an id is outside ``[0, length)`` and is not ``ignore``."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{what}s must be int64 or int32, got {ids.dtype}")
    if ids.is_meta:
        return
    bad = (ids < 0) | (ids >= length)
    if ignore is not None:
        bad &= ids != ignore
    if ids.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(~bad.any(), f"a {what} is outside the valid range 0 to {length - 1}")
    elif bad.any():
        raise ValueError(f"{what} {int(ids[bad][0])} is outside the valid range 0 to {length - 1}")


class PositionEmbedding(Sharded, Described):
    """A learned vector for each position, held by every rank; nothing is sent in forward.

    ``[batch or 1, sequence]`` positions give ``[batch or 1, sequence (_local), dim]``. Under
    sequence parallelism each rank looks up its own positions only, so the gradient is summed over
    the ranks in backward.

    Parameters: ``weight`` ``[max_positions, dim]``, standard normal, drawn as that of
    :class:`VocabParallelEmbedding`, with the same comparison of seeds.

    Raises:
        ValueError: ranks with different seeds.
    """

    def __init__(
        self,
        max_positions: int,
        embedding_dim: int,
        tp: ParallelGroup,
        *,
        sequence_parallel: bool = False,
        sharding: Sharding | None = None,
        layer: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sharding = Sharding.of(sharding, sequence_parallel)
        super().__init__(
            TableSpec(max_positions, embedding_dim),
            tp,
            layer=layer,
            by_sequence=sharding.sequence_parallel,
            device=device,
            dtype=dtype,
        )
        self.max_positions = max_positions
        self.sharding = sharding
        _draw_(self, "positions")

    def forward(
        self,
        positions: Tensor,
        *,
        sequence: SequenceDivision = None,
        shared: SharedWeights | None = None,
    ) -> Tensor:
        """The vectors of these positions.

        Raises:
            ValueError: for a position beyond the table.
        """
        check_range(positions, self.max_positions, "position")
        divided = self.divided_sequence(
            sequence, lambda: Partition.even(positions.shape[-1], self.tp.size)
        )
        if divided is not None:
            positions = primitives.local_range(positions, self.tp, -1, divided)
        shared = shared or SharedWeights.of_layer(self)
        return F.embedding(positions, shared(self, "weight"))
