"""The layers of a decoder that are on one rank: all of them, or those of its pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Self

import torch
from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.layers.column import FusedColumnParallelLinear
from colrow.layers.decoding import Kernel, has_fast_blas, lay_out_
from colrow.layers.describe import Division, ParameterSpec
from colrow.layers.dropout import ParallelDropout
from colrow.layers.linear import Sharded
from colrow.layers.row import RowParallelLinear
from colrow.layers.shared import SharedLayers, sum_gradients_
from colrow.models.cache import KeyValueCache
from colrow.models.communication import predict_step
from colrow.models.config import ModelConfig, num_parameters
from colrow.models.decoder_parts import DecoderParts, allocate
from colrow.models.interface import Description, PredictedCalls
from colrow.models.one_token import OneToken
from colrow.models.pipeline import Blocks, Pipeline
from colrow.models.stages import Stage
from colrow.partition import Partition, ShardSpec
from colrow.sharding import Sharding


def describe(config: ModelConfig) -> Description:
    """What commands know of a decoder before it is there."""
    return Description(
        "decoder",
        config.family,
        config.vocab_size,
        config.max_positions,
        config.longest is not None,
        config.eos_token_ids,
        config.pad_token_id,
    )


class StagedLayers(Sharded, nn.Module):
    """The layers of this rank; arguments as for :class:`colrow.models.decoder.Decoder`.

    Attributes:
        stages: this rank's stages; one, the whole model, without a pipeline.
        division: how dimensions are divided over tp; ``vocab`` is the vocabulary's partition.
        parameter_specs: what each parameter of this rank is, by its name in the whole model.
        specs: how each is divided over tp.
        stored_bytes: of weights that stay in the blocks of their file, the bytes on each tp rank;
            also of those on other stages.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: ParallelGroup,
        *,
        pipeline: Pipeline | None = None,
        division: Division | None = None,
        tensor_split: str | Sequence[float] | None = None,
        sequence_parallel: bool = False,
        sharding: Sharding | None = None,
        check_inputs: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        if division is not None and tensor_split:
            raise ValueError("a division divides the model already: leave out tensor_split")
        self.division = division or config.divide(tp.size, tensor_split)
        self.vocab = self.division.of(config.vocab_size)
        self.pipeline = pipeline or Pipeline.alone(config.num_layers)
        self.stages = self.pipeline.stages
        first, last = (
            any(getattr(s, f"is_{end}") for s in self.stages) for end in ("first", "last")
        )
        self.parameter_specs = self.pipeline.split.held(
            config.parameters(self.division), self.pipeline.pp.rank, tied=config.tie_embeddings
        )
        self.specs = {name: spec.shard for name, spec in self.parameter_specs.items()}
        self.sharding = Sharding.of(sharding, sequence_parallel)
        if tp.size == 1:
            self.sharding = replace(self.sharding, sequence_parallel=False)
        self.check_inputs = check_inputs
        # Built without memory, then allocated once: no layer draws values that are replaced anyway.
        parts = DecoderParts(
            config,
            self.division,
            tp,
            self.sharding,
            device=torch.device("meta"),
            dtype=dtype,
        )
        here = first or (last and config.tie_embeddings)
        self.embedding = parts.embedding() if here else None
        self.positions = parts.positions() if first else None
        self.embedding_norm = parts.norm(config.embedding_norm, "embedding_norm") if first else None
        self.dropout = ParallelDropout(config.embedding_dropout)
        numbers = [number for stage in self.stages for number in stage.blocks]
        self.blocks = Blocks({number: parts.block(number) for number in numbers})
        self.norm = parts.norm(config.norm, "norm") if last else None
        self.head = parts.head() if last else None
        self.sums_shared_later = False
        self.tied_kernel: Kernel | None = None
        self.one_token: OneToken | None = None
        self.stored_bytes: dict[str, tuple[int, ...]] = {}
        allocate(self, torch.device(device))
        self._shared_layers = [SharedLayers(self.layers_of(stage)) for stage in self.stages]

    @property
    def description(self) -> Description:
        """Its kind, its vocabulary, its context and its special tokens."""
        return describe(self.config)

    @property
    def module(self) -> nn.Module:
        """Itself, see :class:`colrow.models.interface.TensorParallelModel`."""
        return self

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    @property
    def vocabulary(self) -> Partition:
        """Which tokens' logits each rank has."""
        return self.vocab

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return num_parameters(self.config)

    def arithmetic(self) -> AbstractContextManager[object]:
        """Nothing to do: every layer computes in the dtype of its parameters."""
        return nullcontext()

    @property
    def takes_padding(self) -> bool:
        """Rows may be padded on the left."""
        return True

    def shards(self) -> dict[str, tuple[nn.Parameter, ShardSpec]]:
        """Every parameter of this rank with how it is divided, by its name in the whole model."""
        return {name: (p, self.specs[name]) for name, p in self.named_parameters()}

    def predicted_calls(self, batch: int, sequence: int) -> PredictedCalls:
        """Every collective of ``loss(...).backward()`` on this rank; see :func:`predict_step`."""
        if self.pipeline.split.ranks > 1:
            return PredictedCalls((), "in a pipeline they follow from its schedule too")
        calls = predict_step(
            self.config,
            self.division,
            batch=batch,
            sequence=sequence,
            sequence_parallel=self.sequence_parallel,
            keep_gathered_input=self.sharding.keep_gathered_input,
            dtype=str(next(self.parameters()).dtype).removeprefix("torch."),
        )
        return PredictedCalls(tuple(calls))

    def one_stage(self, stage: Stage | None) -> Stage:
        """The stage that is meant.

        Raises:
            ValueError: this rank has several and none was named, or the named one is elsewhere.
        """
        if stage is None and len(self.stages) == 1:
            return self.stages[0]
        if stage not in self.stages:
            held = [held.index for held in self.stages]
            raise ValueError(f"this rank has the pipeline stages {held}: name one of them")
        return stage

    def layers_of(self, stage: Stage) -> nn.ModuleList:
        """The modules with the parameters of one of this rank's stages."""
        found: list[nn.Module | None] = []
        if stage.is_first:
            found += [self.embedding, self.positions, self.embedding_norm]
        found += [self.blocks[number] for number in stage.blocks]
        if stage.is_last:
            found += [self.norm, self.embedding if self.head is None else self.head]
        return nn.ModuleList(dict.fromkeys(layer for layer in found if layer is not None))

    def sum_shared_gradients_(self) -> None:
        """With ``sums_shared_later``: the sums over tp that the graph left out, in one bucket."""
        sum_gradients_([at for layers in self._shared_layers for at in layers.all()], self.tp)

    def for_decoding(self) -> Self:
        """Lays the weights out for generating on a CPU, see :mod:`colrow.layers.decoding`.

        Shapes, values and names stay. On CPUs parameters are frozen and lose their gradients: the
        state of an optimiser would be in another order. Weights may be loaded or written to later;
        after writing through ``parameter.data``, and on a copy of the model, call this again.
        Returns the model itself.
        """
        on_cpu = next(self.parameters()).is_cpu
        if on_cpu:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        blas = has_fast_blas()
        for module in self.modules():
            if isinstance(module, FusedColumnParallelLinear | RowParallelLinear):
                module.kernel = lay_out_(module.weight, blas=blas)
        if self.norm is not None and self.head is None and self.embedding is not None:
            self.tied_kernel = lay_out_(self.embedding.weight, blas=blas)
        self.one_token = None
        alone = len(self.stages) == 1 and not self.sequence_parallel
        if on_cpu and alone and OneToken.fits(self.blocks):
            self.one_token = OneToken(self.blocks, self.stages[0].blocks)
        return self

    def make_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for this rank's stage, with memory for so many positions.

        Raises:
            ValueError: several stages on this rank, or blocks whose heads differ.
        """
        stage, parameter = self.one_stage(None), next(self.parameters())
        shapes = {
            block.attention.cache_shape(self.division, self.tp.rank)
            for block in dict.fromkeys(self.config.blocks)
        }
        if len(shapes) > 1:
            raise ValueError(
                f"the blocks of this {self.config.family} model have heads of several kinds"
            )
        ((heads, key_size, value_size),) = shapes
        return KeyValueCache(
            len(stage.blocks),
            batch,
            heads,
            key_size,
            capacity,
            value_dim=value_size,
            dtype=parameter.dtype,
            device=parameter.device,
            first_layer=stage.start,
        )

    def weight_bytes_per_rank(self) -> list[int]:
        """Bytes of parameters on each rank of the pipeline, tp innermost; nothing is sent."""
        itemsize = next(self.parameters()).element_size()
        whole, split = self.config.parameters(self.division), self.pipeline.split
        held = [
            split.held(whole, rank, tied=self.config.tie_embeddings).items()
            for rank in range(split.ranks)
        ]

        def size(name: str, spec: ParameterSpec, rank: int) -> int:
            if name in self.stored_bytes:
                return self.stored_bytes[name][rank]
            return itemsize * math.prod(spec.shard.local_shape(rank))

        return [
            sum(size(name, spec, rank) for name, spec in specs)
            for specs in held
            for rank in range(self.tp.size)
        ]

    def extra_repr(self) -> str:
        """Family, rank and what is held."""
        held = sum(p.numel() for p in self.parameters())
        return (
            f"{self.config.family}, tp_rank={self.tp.rank}/{self.tp.size}, "
            f"parameters held={held:,}, sequence_parallel={self.sequence_parallel}"
        )
