"""What every command knows of a tensor-parallel model, whoever divided it.

Two things are one: :class:`colrow.models.decoder.Decoder`, which colrow computes itself for the
families that it describes (fast; pipelines, GGUF files, uneven shares), and
:class:`colrow.any_model.in_place.InPlaceModel`, any causal language model of transformers whose
own code runs on shards. :func:`colrow.any_model.loading.load_model` makes either and says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call
from colrow.layers.loss import Reduction
from colrow.partition import Partition, ShardSpec

Kind = Literal["decoder", "in place"]


@dataclass(frozen=True)
class Description:
    """What is known of a model before its weights are read.

    Attributes:
        kind: which of the two implementations.
        name: the family or model type, for messages.
        vocab_size: tokens that have a logit.
        max_positions: the longest sequence that the model was made for; None where its
            configuration states none.
        limited: whether a longer one is an error, as with learned positions.
        eos_token_ids: tokens that end an answer, as far as the configuration says.
        pad_token_id: what finished rows are filled with, where the configuration says.
    """

    kind: Kind
    name: str
    vocab_size: int
    max_positions: int | None
    limited: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @property
    def says(self) -> str:
        """Which of the two it is, for a person."""
        how = (
            "colrow's decoder" if self.kind == "decoder" else "transformers' model, split in place"
        )
        return f"{self.name}: {how}"


@dataclass(frozen=True)
class PredictedCalls:
    """The collectives of a training step on one rank, foretold.

    Attributes:
        calls: all of them, in no particular order; empty where they cannot be known.
        unknown: why they cannot be known; "" where they are.
    """

    calls: tuple[Call, ...]
    unknown: str = ""


class Cache(Protocol):
    """What a model keeps of the tokens so far, for the next one."""

    @property
    def length(self) -> int:
        """Tokens that it has seen."""
        ...

    @property
    def bytes(self) -> int:
        """Memory that it takes on this rank."""
        ...


class TensorParallelModel(Protocol):
    """A causal language model whose weights are divided over the ranks of ``tp``.

    Attributes:
        tp: the tensor-parallel group; every rank of it makes the same calls.
    """

    tp: ParallelGroup

    @property
    def description(self) -> Description:
        """Its kind, its vocabulary, its context and its special tokens."""
        ...

    @property
    def module(self) -> nn.Module:
        """What has the parameters: the decoder itself, or transformers' model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        ...

    @property
    def vocabulary(self) -> Partition:
        """Which tokens' logits each rank has: disjoint ranges in rank order."""
        ...

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The repeated layers, in order; each is called as a module."""
        ...

    @property
    def num_parameters(self) -> int:
        """Of the whole model; what is tied counts once."""
        ...

    @property
    def takes_padding(self) -> bool:
        """Whether rows that are padded on the left get the logits that they get alone."""
        ...

    def arithmetic(self) -> AbstractContextManager[object]:
        """Inside it fp64 parameters make all of a forward pass fp64."""
        ...

    def for_decoding(self) -> Self:
        """Ready to generate: in evaluation mode, and laid out for it. Returns itself."""
        ...

    def make_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for so many rows and, as far as is known, tokens of each."""
        ...

    def last_logits(
        self, input_ids: Tensor, *, attention_mask: Tensor | None, cache: Any
    ) -> Tensor:
        """Local logits ``[batch, vocab_local]`` of the last position; extends the cache.

        Args:
            input_ids: ``[batch, new]`` int64, the same on every rank.
            attention_mask: ``[batch, cached + new]``, 0 at padding, which is on the left; None
                where there is none.
            cache: one that this model made.
        """
        ...

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Reduction = "mean",
        dropout_key: int | None = None,
    ) -> Tensor:
        """The next-token loss, the same on every rank; labels are shifted inside.

        ``dropout_key``: which dropout masks; the same key gives the same ones again.
        """
        ...

    def shards(self) -> Mapping[str, tuple[nn.Parameter, ShardSpec]]:
        """Every parameter of this rank with how it is divided, by its name in the whole model."""
        ...

    def weight_bytes_per_rank(self) -> list[int]:
        """Bytes of parameters that each rank holds; nothing is sent."""
        ...

    def predicted_calls(self, batch: int, sequence: int) -> PredictedCalls:
        """What ``loss(...).backward()`` of a batch of this shape will send on this rank."""
        ...
