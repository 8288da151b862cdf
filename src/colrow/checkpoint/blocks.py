"""Gives a decoder its matrices as the quantised blocks that a GGUF file has of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.checkpoint.naming import Naming, Piece, module_template, pieces
from colrow.checkpoint.reader import TensorReader
from colrow.layers import ggml
from colrow.layers.decoding import QuantisedKernel
from colrow.layers.describe import Division
from colrow.layers.quantised import Blocks, QuantisedWeight
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder

# Layers that multiply with blocks, or look rows of them up; experts do not.
_LAYERS = {
    "embedding",
    "blocks.{i}.attention.qkv",
    "blocks.{i}.attention.output",
    "blocks.{i}.mlp.up",
    "blocks.{i}.mlp.down",
    "head",
}
NO_KERNELS = "ggml's kernels are not installed (pip install 'colrow[quantised]')"


def why_not_quantised(reader: TensorReader, device: torch.device) -> str:
    """Why a file's blocks cannot stay as they are; "" where they can."""
    if not isinstance(reader, GGUFTensorReader) or not reader.is_quantised():
        return f"{reader.description} has no quantised blocks"
    if device.type != "cpu":
        return f"there are no kernels for quantised blocks on {device.type}"
    if ggml.library() is None:
        return NO_KERNELS
    return ""


def quantised_division(
    config: ModelConfig, reader: GGUFTensorReader, naming: Naming, division: Division
) -> Division:
    """The same in the grain of the blocks that lie along features."""
    whole = config.parameters(Division(1))
    blocks = [
        reader.block(piece.name)[0]
        for name, spec in whole.items()
        if module_template(name)[0] == "blocks.{i}.mlp.down.weight"
        for piece in pieces(naming, config, name, spec.shard, 0)
    ]
    return replace(division, grain=max(blocks, default=1))


def keep_blocks_(
    model: Decoder, reader: GGUFTensorReader, naming: Naming, dtype: torch.dtype
) -> None:
    """Makes the weights of linear layers and the embedding :class:`QuantisedWeight`.

    A matrix becomes one where the file has any part of it in another type than fp32. Rows that lie
    in the file in one piece stay there, mapped into memory; rows that change places, and parts of
    rows, are copied. Nothing is sent.

    Args:
        model: one whose weights are still to be loaded.
        dtype: of the activations.
    """
    config, rank = model.config, model.tp.rank
    for name, spec in config.parameters(model.division).items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or module_template(layer)[0] not in _LAYERS:
            continue
        held = [pieces(naming, config, name, spec.shard, each) for each in range(model.tp.size)]
        if any(piece.transposed or piece.step != 1 for piece in held[0]) or all(
            reader.kind(piece.name).name == "F32" for piece in held[0]
        ):
            continue
        model.stored_bytes[name] = tuple(
            sum(_rows(piece) * _row_bytes(reader, piece) for piece in each) for each in held
        )
        if name in model.specs:
            weight = _weight(reader, held[rank], name, dtype)
            module: Any = model.get_submodule(layer)
            module.weight = nn.Parameter(weight, requires_grad=False)
            if layer != "embedding":
                module.kernel = QuantisedKernel()
            elif model.norm is not None and model.head is None:
                model.tied_kernel = QuantisedKernel()


def _weight(
    reader: GGUFTensorReader, held: list[Piece], label: str, dtype: torch.dtype
) -> QuantisedWeight:
    """The shard that these pieces make up, one below the other."""
    blocks: list[Blocks] = []
    copied = False
    for piece in held:
        kind, data = reader.kind(piece.name), _data(reader, piece)
        if piece.pairs:
            data = _unpaired(data, piece.pairs)
        if copied and blocks[-1].kind == kind:  # one product for both, since it is a copy anyway
            blocks[-1] = Blocks(kind, kind.name, np.concatenate([blocks[-1].data, data]))
        elif len(data):
            blocks.append(Blocks(kind, kind.name, data))
            copied = piece.pairs is not None
    first, last = _columns(reader, held[0])
    columns = held[0].ranges[0] if held[0].dim == 1 else (first, last)
    own = columns[0] - first, columns[1] - first
    return QuantisedWeight(tuple(blocks), own, last - first, dtype=dtype, label=label)


def _data(reader: GGUFTensorReader, piece: Piece) -> npt.NDArray[np.uint8]:
    rows = piece.ranges if piece.dim == 0 else ((0, piece.shape[0]),)
    return reader.stored(piece.name, rows, _columns(reader, piece))


def _columns(reader: GGUFTensorReader, piece: Piece) -> tuple[int, int]:
    """The columns of the blocks that cover a piece."""
    block, _ = reader.block(piece.name)
    if piece.dim == 0:
        return 0, piece.shape[1]
    ((start, stop),) = piece.ranges
    return start // block * block, -(-stop // block) * block


def _rows(piece: Piece) -> int:
    if piece.dim == 0:
        return sum(stop - start for start, stop in piece.ranges)
    return piece.shape[0]


def _row_bytes(reader: GGUFTensorReader, piece: Piece) -> int:
    block, size = reader.block(piece.name)
    start, stop = _columns(reader, piece)
    return (stop - start) // block * size


def _unpaired(rows: npt.NDArray[np.uint8], head_dim: int) -> npt.NDArray[np.uint8]:
    """Rows of whole heads from interleaved rotary pairs to halves, see :func:`unpair`."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.array(heads.swapaxes(1, 2)).reshape(rows.shape)
