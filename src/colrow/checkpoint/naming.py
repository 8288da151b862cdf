"""Which checkpoint tensors make up a parameter, and which of their slices a rank holds.

Plain Python: the answer is a value that loading, assembling and exporting all use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from colrow.layers.describe import ExpertsSpec
from colrow.models.config import ModelConfig, attention_of
from colrow.models.families import family_named
from colrow.models.families.family import FusedLayout
from colrow.partition import Range, ShardSpec

_NUMBERS = ("{i}", "{e}")  # of a layer, of an expert


@dataclass(frozen=True)
class Naming:
    """Names and layout of the tensors in one kind of file.

    Attributes:
        modules: colrow's module name to the file's, with ``{i}`` for the layer and ``{e}`` for the
            expert. Where the file's name has no ``{e}``, one tensor holds all experts.
        fused: see :class:`colrow.models.families.family.Family`.
        transposed: block matrices are stored ``[in, out]``.
        paired_heads: rows of Q and K are stored as interleaved rotary pairs.
        centred_norms: norms' weights are stored with the 1 added that the model adds.
    """

    modules: Mapping[str, tuple[str, ...]]
    fused: FusedLayout = "side_by_side"
    transposed: bool = False
    paired_heads: bool = False
    centred_norms: bool = False


@dataclass(frozen=True)
class Piece:
    """A slice of one checkpoint tensor that a rank holds, and where it goes.

    Attributes:
        name: the checkpoint tensor.
        shape: its whole shape, as stored.
        dim: its dimension that is divided, as stored; None for the whole tensor. Of a tensor of
            experts the first two dimensions count as one.
        ranges: what this rank holds along ``dim``.
        target: where that lies in the parameter's shard, along the shard's divided dimension.
        transposed: the slice must be transposed to become part of the parameter.
        pairs: size of the heads whose rows are interleaved rotary pairs, or None.
        rows: of a tensor of experts, the rows of the expert in question, or None.
        added: what the file's values are larger by.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[Range, ...]
    target: Range
    transposed: bool = False
    pairs: int | None = None
    rows: Range | None = None
    added: float = 0.0


def hf_naming(config: ModelConfig) -> Naming:
    """Names of the family's Hugging Face checkpoints."""
    family = family_named(config.family)
    return Naming(family.modules, family.fused, family.transposed)


def gguf_naming(config: ModelConfig) -> Naming:
    """Names of the tensors in a GGUF file of this model.

    Raises:
        ValueError: a family that has none.
    """
    form = family_named(config.family).gguf
    if form is None:
        raise ValueError(f"{config.family} models are not read from or written to GGUF files")
    return Naming(form.modules, paired_heads=form.paired_heads, centred_norms=form.centred_norms)


def module_template(module: str) -> tuple[str, list[str]]:
    """A module's name with its numbers taken out: of its layer, and of its expert."""
    words, numbers = module.split("."), list[str]()
    for at, word in enumerate(words):
        if word.isdigit():
            words[at] = _NUMBERS[len(numbers)]
            numbers.append(word)
    return ".".join(words), numbers


def pieces(
    naming: Naming, config: ModelConfig, parameter: str, spec: ShardSpec, rank: int
) -> list[Piece]:
    """What ``rank`` holds of ``parameter``, in the file's terms."""
    module, kind = parameter.rsplit(".", 1)
    template, numbers = module_template(module)
    if template not in naming.modules:
        raise ValueError(f"{config.family} checkpoints have no tensor for {parameter}")
    number, expert = (*numbers, "", "")[:2]
    files = naming.modules[template]
    names = [f"{name.format(i=number, e=expert)}.{kind}" for name in files]
    matrix = len(spec.shape) == 2 and template.startswith("blocks.")
    transposed = naming.transposed and matrix
    added = float(naming.centred_norms and template.endswith("norm"))
    if spec.dim is None:
        whole = (0, spec.shape[0])
        return [Piece(names[0], spec.shape, None, (), whole, added=added)]
    found, offset = [], 0
    for index, (block, start) in enumerate(zip(spec.blocks, spec.local_offsets(rank), strict=True)):
        first, last = block.bounds[rank]
        ranges: tuple[Range, ...] = ((first, last),)
        length = block.length
        if len(names) == 1 and len(spec.blocks) > 1:
            length = spec.shape[spec.dim]
            if naming.fused == "interleaved":
                head_dim = attention_of(config.blocks[int(number)]).head_dim
                ranges = _interleaved(first, last, index, len(spec.blocks), head_dim)
            else:
                ranges = ((offset + first, offset + last),)
        shape = (*spec.shape[: spec.dim], length, *spec.shape[spec.dim + 1 :])
        dim = spec.dim
        if transposed:
            shape, dim = shape[::-1], 1 - dim
        rows = None
        if expert and "{e}" not in files[0]:
            mlp = config.blocks[int(number)].mlp
            count = mlp.count if isinstance(mlp, ExpertsSpec) else 1
            rows = (int(expert) * shape[0], (int(expert) + 1) * shape[0])
            shape = (count, *shape)
            if dim == 0:
                ranges = tuple((rows[0] + a, rows[0] + b) for a, b in ranges)
        paired = naming.paired_heads and template.endswith("attention.qkv") and index < 2
        found.append(
            Piece(
                name=names[index if len(names) > 1 else 0],
                shape=shape,
                dim=dim,
                ranges=ranges,
                target=(start, start + last - first),
                transposed=transposed,
                pairs=attention_of(config.blocks[int(number)]).head_dim if paired else None,
                rows=rows,
                added=added,
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
