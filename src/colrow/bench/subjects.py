"""What can be measured: a model, or parts of one of its blocks, with random weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from colrow.bench.result import BenchSettings
from colrow.comm.mesh import Mesh
from colrow.generation.sampling import next_tokens
from colrow.layers.attention import ParallelAttention
from colrow.layers.block import ParallelBlock
from colrow.layers.mlp import ParallelMLP
from colrow.layers.row import RowParallelLinear
from colrow.models.build import from_config
from colrow.models.cache import KeyValueCache
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.models.interface import Cache, TensorParallelModel
from colrow.partition import Partition
from colrow.train.optimizer import adamw

TOKENS_PER_RUN = 16


@dataclass(frozen=True)
class Phase:
    """A part of a run: ``function`` is called ``count`` times, and seconds are per call."""

    name: str
    function: Callable[[], object]
    count: int = 1


@dataclass(frozen=True)
class Subject:
    """Something to measure; its phases run in order, once each per run.

    Attributes:
        tokens: that one call of the decisive phases works on.
    """

    name: str
    phases: tuple[Phase, ...]
    tokens: int


def decoder_subjects(settings: BenchSettings, config: ModelConfig, mesh: Mesh) -> list[Subject]:
    """Builds what the settings ask for of a decoder; all ranks call it."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    if settings.what != "model":
        # A block's shape does not depend on the rest of the model, which would only take memory.
        config = replace(
            config,
            blocks=config.blocks[:1],
            # of which every rank has one
            vocab_size=max(2, config.blocks[0].attention.num_heads),
            pad_token_id=None,
            freeze_padding=False,
        )
    model = from_config(
        config,
        mesh,
        dtype=dtype,
        sequence_parallel=settings.sequence_parallel,
        tensor_split=settings.tensor_split_of(mesh.tp.size),
    )
    model.train(not settings.decode)
    if settings.decode:
        model.for_decoding()
    if settings.what == "model":
        return [whole_model(model, settings)]
    block = model.blocks[0]
    assert isinstance(block, ParallelBlock)
    parts: dict[str, nn.Module] = {
        "attention": block.attention,
        "mlp": block.mlp,
        "block": block,
    }
    if settings.what == "layer":
        if not isinstance(block.attention, ParallelAttention) or not isinstance(
            block.mlp, ParallelMLP
        ):
            raise ValueError(
                "the linear layers of experts and of latent attention are not measured one by one"
            )
        parts = {
            "attention.qkv": block.attention.qkv,
            "attention.output": block.attention.output,
            **{f"mlp.{name}": part for name, part in block.mlp.named_children()},
        }
    else:
        parts = {settings.what: parts[settings.what]}
    build = _part_decoding if settings.decode else _part_training
    return [build(name, part, model, settings) for name, part in parts.items()]


def whole_model(model: TensorParallelModel, settings: BenchSettings) -> Subject:
    """Training steps, or generation."""
    return _generation(model, settings) if settings.decode else _training(model, settings)


def _training(model: TensorParallelModel, settings: BenchSettings) -> Subject:
    ids = random_tokens(model, settings)
    optimizer = adamw(model.module)
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(model.loss(ids, ids))

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    phases = (
        Phase("forward", forward),
        Phase("backward", lambda: losses.pop().backward()),
        Phase("optimizer", step),
    )
    return Subject("model", phases, ids.numel())


def random_tokens(model: TensorParallelModel, settings: BenchSettings) -> Tensor:
    """``[batch, sequence]``, the same on every rank."""
    shape = (settings.batch, settings.sequence)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.description.vocab_size, shape, generator=generator)
    return ids.to(model.device)


def _generation(model: TensorParallelModel, settings: BenchSettings) -> Subject:
    ids = random_tokens(model, settings)
    caches: list[Cache] = []
    tokens: list[Tensor] = []

    @torch.inference_mode()
    def step(new: Tensor) -> None:
        logits = model.last_logits(new, attention_mask=None, cache=caches[0])
        tokens[:] = [next_tokens(logits, model.tp, model.vocabulary)]

    def prompt() -> None:
        caches[:] = [model.make_cache(settings.batch, settings.sequence + TOKENS_PER_RUN)]
        step(ids)

    phases = (
        Phase("prompt", prompt),
        Phase("token", lambda: step(tokens[0].unsqueeze(1)), TOKENS_PER_RUN),
    )
    return Subject("model", phases, settings.batch)


def _part_training(name: str, part: nn.Module, model: Decoder, settings: BenchSettings) -> Subject:
    sequence = Partition.even(settings.sequence, model.tp.size) if model.sequence_parallel else None
    # A row-parallel layer's input is whole along the sequence and divided along the features.
    length = settings.sequence
    if sequence is not None and not isinstance(part, RowParallelLinear):
        length = sequence.size(model.tp.rank)
    x = _input(part, model, settings.batch, length).requires_grad_()
    tokens = settings.batch * settings.sequence
    return part_training(name, part, x, lambda: part(x, sequence=sequence), tokens)


def part_training(
    name: str, part: nn.Module, x: Tensor, run: Callable[[], Tensor], tokens: int
) -> Subject:
    """Forward and backward of a part.

    Args:
        x: its input, with a gradient.
        run: gives its result for ``x``.
    """
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(run())

    forward()
    gradient = torch.ones_like(outputs.pop())

    def backward() -> None:
        x.grad = None
        part.zero_grad()
        torch.autograd.backward([outputs.pop()], [gradient])

    phases = (Phase("forward", forward), Phase("backward", backward))
    return Subject(name, phases, tokens)


def _part_decoding(name: str, part: nn.Module, model: Decoder, settings: BenchSettings) -> Subject:
    x = _input(part, model, settings.batch, 1)
    cached = name in ("attention", "block")
    caches: list[KeyValueCache] = []

    def refill() -> None:
        cache = model.make_cache(settings.batch, settings.sequence + TOKENS_PER_RUN)
        attention = model.config.blocks[0].attention
        heads, *sizes = attention.cache_shape(model.division, model.tp.rank)
        keys, values = (
            x.new_zeros(settings.batch, heads, settings.sequence, size) for size in sizes
        )
        cache.update(0, keys, values)
        caches[:] = [cache]

    @torch.inference_mode()
    def token() -> None:
        if not cached:
            part(x)
            return
        if caches[0].length == settings.sequence + TOKENS_PER_RUN:
            refill()
        part(x, cache=caches[0])

    if cached:
        refill()
    return Subject(name, (Phase("token", token, TOKENS_PER_RUN),), settings.batch)


def _input(part: nn.Module, model: Decoder, batch: int, length: int) -> Tensor:
    """Random activations of unit size, ``[batch, length, features]``."""
    parameter = next(part.parameters())
    features = model.config.hidden_size
    if isinstance(part, RowParallelLinear):
        features = part.weight.shape[1]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, features, generator=generator)
    return x.to(parameter.device, parameter.dtype)
