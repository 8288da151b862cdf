"""The layers of a decoder that are on one rank: all of them, or those of its pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import nn

from colrow.comm.group import ParallelGroup
from colrow.layers.column import FusedColumnParallelLinear
from colrow.layers.decoding import Kernel, has_fast_blas, lay_out_
from colrow.layers.dropout import ParallelDropout
from colrow.layers.row import RowParallelLinear
from colrow.layers.shared import SharedLayers, sum_gradients_
from colrow.models.communication import predict_step
from colrow.models.config import Layout, ModelConfig, num_parameters, parameter_specs
from colrow.models.decoder_parts import DecoderParts, allocate
from colrow.models.interface import Description, Prediction
from colrow.models.one_token import OneToken
from colrow.models.pipeline import Blocks, Pipeline
from colrow.models.stages import Stage
from colrow.partition import Partition, ShardSpec


def describe(config: ModelConfig) -> Description:
    """What commands know of a decoder before it is there."""
    return Description(
        "decoder",
        config.family,
        config.vocab_size,
        config.max_positions,
        config.position == "learned",
        config.eos_token_ids,
        config.pad_token_id,
    )


class StagedLayers(nn.Module):
    """The layers of this rank; arguments as for :class:`colrow.models.decoder.Decoder`.

    Attributes:
        stages: this rank's stages; one, the whole model, without a pipeline.
        specs: how each parameter of this rank is divided over tp, by its name in the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: ParallelGroup,
        *,
        pipeline: Pipeline | None = None,
        layout: Layout | None = None,
        tensor_split: str | Sequence[float] | None = None,
        sequence_parallel: bool = False,
        keep_gathered_input: bool = True,
        overlap: bool = True,
        chunk_bytes: int | None = None,
        check_inputs: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        if layout is not None and tensor_split:
            raise ValueError("a layout divides the model already: leave out tensor_split")
        self.layout = layout or Layout.create(config, tp.size, tensor_split)
        self.pipeline = pipeline or Pipeline.alone(config.num_layers)
        self.stages = self.pipeline.stages
        first, last = (
            any(getattr(s, f"is_{end}") for s in self.stages) for end in ("first", "last")
        )
        self.specs = self.pipeline.split.held(
            parameter_specs(config, self.layout), self.pipeline.pp.rank, tied=config.tie_embeddings
        )
        self.sequence_parallel = sequence_parallel = sequence_parallel and tp.size > 1
        self.keep_gathered_input, self.overlap = keep_gathered_input, overlap
        self.chunk_bytes = chunk_bytes
        self.check_inputs = check_inputs
        # Built without memory, then allocated once: no layer draws values that are replaced anyway.
        parts = DecoderParts(
            config,
            self.layout,
            tp,
            sequence_parallel=sequence_parallel,
            keep_gathered_input=keep_gathered_input,
            overlap=overlap,
            chunk_bytes=chunk_bytes,
            device=torch.device("meta"),
            dtype=dtype,
        )
        here = first or (last and config.tie_embeddings)
        self.embedding = parts.embedding() if here else None
        self.positions = parts.positions() if first else None
        self.embedding_norm = (
            parts.norm("embedding_norm") if first and config.embedding_norm else None
        )
        self.dropout = ParallelDropout(config.embedding_dropout)
        numbers = [number for stage in self.stages for number in stage.blocks]
        self.blocks = Blocks({number: parts.block(number) for number in numbers})
        self.norm = parts.norm("norm") if last else None
        self.head = parts.head() if last else None
        self.sums_shared_later = False
        self.tied_kernel: Kernel | None = None
        self.one_token: OneToken | None = None
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
        return self.layout.vocab

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

    def predicted_calls(self, batch: int, sequence: int) -> Prediction:
        """Every collective of ``loss(...).backward()`` on this rank; see :func:`predict_step`."""
        if self.pipeline.split.ranks > 1:
            return Prediction((), "in a pipeline they follow from its schedule too")
        calls = predict_step(
            self.config,
            self.layout,
            batch=batch,
            sequence=sequence,
            sequence_parallel=self.sequence_parallel,
            keep_gathered_input=self.keep_gathered_input,
            chunk_bytes=self.chunk_bytes,
            dtype=str(next(self.parameters()).dtype).removeprefix("torch."),
        )
        return Prediction(tuple(calls))

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
        if next(self.parameters()).device.type == "cpu":
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
        if OneToken.fits(self):
            self.one_token = OneToken(self.blocks, self.stages[0].blocks)
        return self

    def weight_bytes_per_rank(self) -> list[int]:
        """Bytes of parameters on each rank of the pipeline, tp innermost; nothing is sent."""
        itemsize = next(self.parameters()).element_size()
        whole, split = parameter_specs(self.config, self.layout), self.pipeline.split
        held = [
            split.held(whole, rank, tied=self.config.tie_embeddings).values()
            for rank in range(split.ranks)
        ]
        return [
            itemsize * sum(math.prod(spec.local_shape(rank)) for spec in specs)
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
