"""Which checkpoint tensors make up a parameter, and which of their slices a rank holds.

Plain Python: the answer is a value that loading, assembling and exporting all use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from colrow.models.config import ModelConfig
from colrow.models.families import FusedLayout, family_named
from colrow.partition import Range, ShardSpec


@dataclass(frozen=True)
class Naming:
    """Names and layout of the tensors in one kind of file.

    Attributes:
        modules: colrow's module name to the file's, with ``{i}`` for the layer.
        qkv_layout: see :class:`colrow.models.families.Family`.
        transposed: block matrices are stored ``[in, out]``.
        paired_heads: rows of Q and K are stored as interleaved rotary pairs.
    """

    modules: Mapping[str, tuple[str, ...]]
    qkv_layout: FusedLayout
    transposed: bool = False
    paired_heads: bool = False


@dataclass(frozen=True)
class Piece:
    """A slice of one checkpoint tensor that a rank holds, and where it goes.

    Attributes:
        name: the checkpoint tensor.
        shape: its whole shape, as stored.
        dim: its dimension that is divided, as stored; None for the whole tensor.
        ranges: what this rank holds along ``dim``.
        target: where that lies in the parameter's shard, along the shard's divided dimension.
        transposed: the slice must be transposed to become part of the parameter.
        pairs: size of the heads whose rows are interleaved rotary pairs, or None.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[Range, ...]
    target: Range
    transposed: bool = False
    pairs: int | None = None


def hf_naming(config: ModelConfig) -> Naming:
    """Names of the family's Hugging Face checkpoints."""
    family = family_named(config.family)
    return Naming(family.modules, family.qkv_layout, family.transposed)


def pieces(
    naming: Naming, config: ModelConfig, parameter: str, spec: ShardSpec, rank: int
) -> list[Piece]:
    """What ``rank`` holds of ``parameter``, in the file's terms."""
    module, kind = parameter.rsplit(".", 1)
    template, number = module, ""
    if module.startswith("blocks."):
        _, number, rest = module.split(".", 2)
        template = f"blocks.{{i}}.{rest}"
    if template not in naming.modules:
        raise ValueError(f"{config.family} checkpoints have no tensor for {parameter}")
    names = [f"{name.format(i=number)}.{kind}" for name in naming.modules[template]]
    matrix = len(spec.shape) == 2 and template.startswith("blocks.")
    transposed = naming.transposed and matrix
    if spec.dim is None:
        return [Piece(names[0], spec.shape, None, (), (0, spec.shape[0]))]
    found, offset = [], 0
    for index, (block, start) in enumerate(zip(spec.blocks, spec.local_offsets(rank), strict=True)):
        first, last = block.bounds[rank]
        ranges: tuple[Range, ...] = ((first, last),)
        length = block.length
        if len(names) == 1 and len(spec.blocks) > 1:
            length = spec.shape[spec.dim]
            if naming.qkv_layout == "interleaved":
                ranges = _interleaved(first, last, index, len(spec.blocks), config.head_dim)
            else:
                ranges = ((offset + first, offset + last),)
        shape = (*spec.shape[: spec.dim], length, *spec.shape[spec.dim + 1 :])
        dim = spec.dim
        if transposed:
            shape, dim = shape[::-1], 1 - dim
        paired = naming.paired_heads and template.endswith("attention.qkv") and index < 2
        found.append(
            Piece(
                name=names[index if len(names) > 1 else 0],
                shape=shape,
                dim=dim,
                ranges=ranges,
                target=(start, start + last - first),
                transposed=transposed,
                pairs=config.head_dim if paired else None,
            )
        )
        offset += block.length
    return found


def _interleaved(
    first: int, last: int, index: int, blocks: int, head_dim: int
) -> tuple[Range, ...]:
    """Rows of block ``index`` where the file holds, head by head, one head of every block."""
    return tuple(
        ((head * blocks + index) * head_dim, (head * blocks + index + 1) * head_dim)
        for head in range(first // head_dim, last // head_dim)
    )
