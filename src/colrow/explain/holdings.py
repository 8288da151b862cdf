"""What each rank holds and sends, read off a model's description. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from colrow.comm.ledger import Call
from colrow.layers.describe import BlockSpec, Division
from colrow.models.communication import ITEMSIZE, predict_step
from colrow.models.config import ModelConfig
from colrow.partition import Range


@dataclass(frozen=True)
class Question:
    """What the page is about.

    Attributes:
        name: of the model.
        config, division: the model and how it is divided.
        batch, sequence: tokens of the step whose collectives are shown.
        sequence_parallel: whether norms and residuals are divided too.
        dtype: of parameters and activations, as torch names it.
    """

    name: str
    config: ModelConfig
    division: Division
    batch: int = 1
    sequence: int = 2048
    sequence_parallel: bool = False
    dtype: str = "bfloat16"

    @property
    def ranks(self) -> int:
        """Size of the tensor-parallel group."""
        return self.division.ranks

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def kinds(self) -> dict[BlockSpec, list[int]]:
        """The different blocks, and which layers are so."""
        found: dict[BlockSpec, list[int]] = {}
        for layer, block in enumerate(self.config.blocks):
            found.setdefault(block, []).append(layer)
        return found


GROUPS = ("embedding and head", "attention", "MLP", "whole on every rank")


@dataclass(frozen=True)
class Holding:
    """What one rank has.

    Attributes:
        query_heads, key_value_heads, features: of the first block, as index ranges.
        vocabulary: rows of the embedding and of the head.
        elements: numbers of parameters, by :data:`GROUPS`.
        cached: numbers that a cache keeps of a token, over all layers.
    """

    query_heads: Range
    key_value_heads: Range
    features: Range
    vocabulary: Range
    elements: dict[str, int]
    cached: int

    @property
    def parameters(self) -> int:
        """Numbers of all parameters."""
        return sum(self.elements.values())


def holdings(question: Question) -> list[Holding]:
    """By rank."""
    config, division = question.config, question.division
    block = config.blocks[0]
    heads = block.attention.heads(division)
    features = division.of(block.mlp.ffn_size)
    vocabulary = division.of(config.vocab_size)
    parameters = config.parameters(division)
    found = []
    for rank in range(question.ranks):
        elements = dict.fromkeys(GROUPS, 0)
        for name, parameter in parameters.items():
            group = GROUPS[3] if parameter.shard.dim is None else _group(name)
            elements[group] += math.prod(parameter.shard.local_shape(rank))
        found.append(
            Holding(
                heads.query.bounds[rank],
                heads.key_value.bounds[rank],
                features.bounds[rank],
                vocabulary.bounds[rank],
                elements,
                sum(each.attention.cached(division, rank) for each in config.blocks),
            )
        )
    return found


def _group(name: str) -> str:
    """Of a divided parameter, by colrow's name of it."""
    words = name.split(".")
    if words[0] != "blocks":
        return GROUPS[0]
    return GROUPS[1] if words[2] == "attention" else GROUPS[2]


@dataclass(frozen=True)
class Traffic:
    """The collectives of a step on one rank, in the order in which they happen.

    Attributes:
        forward, backward: of one layer, without the numbers of the layer in their names.
        around: of what stands around the blocks, and of the gradients that several ranks share.
        calls, wire_bytes: of the whole step, the latter as rings send them.
    """

    forward: tuple[Call, ...]
    backward: tuple[Call, ...]
    around: tuple[Call, ...]
    calls: int
    wire_bytes: float


def traffic(question: Question, layer: int) -> Traffic:
    """Of a step of training; that of ``layer`` in full."""
    every = predict_step(
        question.config,
        question.division,
        batch=question.batch,
        sequence=question.sequence,
        sequence_parallel=question.sequence_parallel,
        dtype=question.dtype,
    )
    prefix = f"blocks.{layer}."
    own = [call for call in every if call.layer.startswith(prefix)]
    layers = list(dict.fromkeys(call.layer for call in own))
    backward = [
        call
        for name in reversed(layers)
        for call in own
        if call.layer == name and call.phase == "backward"
    ]
    return Traffic(
        tuple(call for call in own if call.phase == "forward"),
        tuple(backward),
        tuple(call for call in every if not call.layer.startswith("blocks.")),
        len(every),
        sum(call.wire_bytes(question.ranks) for call in every),
    )


def layers_text(layers: Sequence[int]) -> str:
    """ "0 to 3, 5", for the numbers of layers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in runs)
