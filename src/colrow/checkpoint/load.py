"""Fills a decoder's shards from a checkpoint; each rank reads only the slices that it holds."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from colrow.checkpoint.gguf_rope import FACTORS
from colrow.checkpoint.naming import Naming, Piece, pieces
from colrow.checkpoint.reader import Ranges, TensorReader, row_chunks
from colrow.checkpoint.tied_head import missing_prefix
from colrow.layers.describe import Division
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.partition import ShardSpec

# Buffers that older checkpoints carry; the decoder computes what they hold.
_IGNORED = re.compile(
    r"(\.attn\.(bias|masked_bias)|\.attention\.(bias|masked_bias)|rotary_emb\.inv_freq|"
    r"\.attn_rot_embd(\.\w+)?)$"
)


@torch.no_grad()
def load_(model: Decoder, reader: TensorReader, naming: Naming) -> None:
    """Copies the checkpoint into the model, slice by slice; nothing is sent.

    :func:`check_tensors` has to have found them right.
    """
    held = {
        name: pieces(naming, model.config, name, spec, model.tp.rank)
        for name, spec in model.specs.items()
    }
    prefix = missing_prefix(naming, reader.names())
    for name, parameter in model.named_parameters():
        if name in model.stored_bytes:  # stays in the blocks of the file
            continue
        spec = model.specs[name]
        for piece in held[name]:
            part = place_of(parameter, spec, piece)
            _fill(part.t() if piece.transposed else part, reader, piece, prefix)


def place_of(parameter: Tensor, spec: ShardSpec, piece: Piece) -> Tensor:
    """The part of a parameter's shard that a piece fills."""
    if piece.expert is not None:
        parameter = parameter[piece.expert]
    if spec.dim is None:
        return parameter
    start, stop = piece.target
    return parameter.narrow(spec.dim - int(piece.expert is not None), start, stop - start)


def _fill(part: Tensor, reader: TensorReader, piece: Piece, prefix: str) -> None:
    """Reads a slice into ``part``, which lies as the file does, a bounded number of rows a time."""
    name = piece.name.removeprefix(prefix)
    rows = piece.ranges if piece.dim == 0 else ((0, part.shape[0]),)
    columns = piece.ranges if piece.dim == 1 else None
    for place, wanted in row_chunks(part, rows, multiple=piece.pairs or 1):  # whole heads
        dtype = part.dtype
        if piece.added and dtype.itemsize < 4:  # rounded when what was added is gone
            dtype = torch.float32
        chunk = _read(reader, name, piece, wanted, columns, dtype)
        if piece.added:
            chunk -= piece.added
        place.copy_(chunk if piece.pairs is None else unpair(chunk, piece.pairs))


def _read(
    reader: TensorReader,
    name: str,
    piece: Piece,
    rows: Ranges,
    columns: Ranges | None,
    dtype: torch.dtype,
) -> Tensor:
    """Rows and columns of a tensor, or of one expert's part of it.

    Of tensors that hold all experts a reader gives whole rows, of which columns are taken here.
    """
    step = piece.step
    if step > 1 and piece.dim == 0:  # what lies between is read too
        rows = _spread(rows, piece)
    elif step > 1 and columns is not None:
        columns = _spread(columns, piece)
    if piece.stacked:
        assert piece.expert is not None
        own = ((piece.expert, piece.expert + 1),)
        chunk = reader.read(name, own, rows, dtype=dtype)[0]
        if columns is not None:
            chunk = torch.cat([chunk[:, first:last] for first, last in columns], dim=1)
    else:
        chunk = reader.read(name, rows, columns, dtype=dtype)
    if step == 1:
        return chunk
    return chunk[::step] if piece.dim == 0 else chunk[:, ::step]


def _spread(ranges: Ranges, piece: Piece) -> Ranges:
    """The file's ranges from the first to the last index of each."""
    return tuple(
        (first * piece.step + piece.phase, (last - 1) * piece.step + piece.phase + 1)
        for first, last in ranges
    )


def unpair(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads from interleaved rotary pairs (2i, 2i + 1) to halves (i, i + dim / 2)."""
    heads = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def check_tensors(config: ModelConfig, reader: TensorReader, naming: Naming) -> None:
    """Compares the checkpoint's tensors with the configuration, before there is a model.

    Raises:
        ValueError: when tensors are missing, have the wrong shape, or are left over.
    """
    if config.num_layers > len(reader.names()):  # said before thousands of layers are listed
        raise ValueError(
            f"{reader.description} lacks layers: it has {len(reader.names())} tensors, and the "
            f"configuration asks for {config.num_layers} layers"
        )
    held = {
        name: pieces(naming, config, name, spec.shard, 0)
        for name, spec in config.parameters(Division(1)).items()
    }
    prefix = missing_prefix(naming, reader.names())
    expected = {
        piece.name.removeprefix(prefix): piece.shape for found in held.values() for piece in found
    }
    names = reader.names()
    missing = sorted(expected.keys() - names)
    if missing:
        raise ValueError(
            f"{reader.description} lacks {_some(missing)} of the {len(expected)} tensors that a "
            f"{config.family} model of this configuration has"
        )
    for name, shape in expected.items():
        if tuple(reader.shape(name)) != shape:
            raise ValueError(
                f"{name} in {reader.description} has shape {tuple(reader.shape(name))}, but the "
                f"configuration asks for {shape}"
            )
    tied = set(naming.modules["head"]) if config.tie_embeddings else set()
    ignored = {f"{name}.weight" for name in tied}
    ignored |= FACTORS
    extra = sorted(
        name
        for name in names - expected.keys() - ignored
        if not _IGNORED.search(name) and not _is_later(naming, config, f"{prefix}{name}")
    )
    if extra:
        raise ValueError(
            f"{reader.description} has {_some(extra)} beyond what a {config.family} model of "
            "this configuration holds; the file and its configuration do not belong together"
        )


def _is_later(naming: Naming, config: ModelConfig, name: str) -> bool:
    """Whether a tensor is of a layer behind the last, which a family leaves out."""
    before, _, rest = name.partition(".layers.")
    number = rest.split(".")[0]
    is_layer = naming.later_layers and before == "model" and number.isdigit()
    return is_layer and int(number) >= config.num_layers


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
