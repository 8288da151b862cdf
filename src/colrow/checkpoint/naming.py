"""Which checkpoint tensors make up a parameter, and which of their slices a rank holds.

Plain Python: the answer is a value that loading, assembling and exporting all use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from colrow.layers.describe import AttentionSpec, BlockSpec, ExpertsSpec
from colrow.models.config import ModelConfig, attention_of
from colrow.models.families import family_named
from colrow.models.families.family import FusedLayout, Transposed
from colrow.partition import Range, ShardSpec


@dataclass(frozen=True)
class Naming:
    """Names and layout of the tensors in one kind of file.

    Attributes:
        modules: see :class:`colrow.models.families.family.Family`.
        fused, transposed, alternating: as there.
        paired_heads: rows of Q and K are stored as interleaved rotary pairs.
        later_layers: see :class:`colrow.models.families.family.Family`.
        centred_norms: norms' weights are stored with the 1 added that the model adds.
    """

    modules: Mapping[str, tuple[str, ...]]
    fused: FusedLayout = "side_by_side"
    transposed: Transposed = "none"
    alternating: bool = False
    paired_heads: bool = False
    centred_norms: bool = False
    later_layers: bool = False


@dataclass(frozen=True)
class Piece:
    """A slice of one checkpoint tensor that a rank holds, and where it goes.

    Attributes:
        name: the checkpoint tensor.
        shape: its whole shape, as stored.
        dim: its dimension that is divided, as stored and without the one for experts; None for the
            whole tensor.
        ranges: what this rank holds along ``dim``, in steps.
        target: where that lies in the parameter's shard, along the shard's divided dimension.
        step, phase: index ``n`` of the ranges is index ``step * n + phase`` of the file's.
        transposed: the slice must be transposed to become part of the parameter.
        pairs: size of the heads whose rows are interleaved rotary pairs, or None.
        expert: whose part of a parameter that holds many experts it is, or None.
        stacked: the file's tensor holds all experts, in its first dimension.
        added: what the file's values are larger by.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[Range, ...]
    target: Range
    step: int = 1
    phase: int = 0
    transposed: bool = False
    pairs: int | None = None
    expert: int | None = None
    stacked: bool = False
    added: float = 0.0


def hf_naming(config: ModelConfig) -> Naming:
    """Names of the family's Hugging Face checkpoints."""
    family = family_named(config.family)
    return Naming(
        family.modules_of(config),
        family.fused,
        family.transposed,
        family.alternating,
        later_layers=family.later_layers,
    )


def gguf_naming(config: ModelConfig) -> Naming:
    """Names of the tensors in a GGUF file of this model.

    Raises:
        ValueError: a family that has none.
    """
    family = family_named(config.family)
    form = family.gguf
    if form is None:
        raise ValueError(f"{config.family} models are not read from or written to GGUF files")
    return Naming(
        family.gguf_modules_of(config),
        paired_heads=form.paired_heads,
        centred_norms=form.centred_norms,
    )


def module_template(module: str) -> tuple[str, str]:
    """A module's name with the number of its layer taken out, and that; "" for none."""
    words, number = module.split("."), ""
    for at, word in enumerate(words):
        if word.isdigit():
            words[at], number = "{i}", word
    return ".".join(words), number


def pieces(
    naming: Naming, config: ModelConfig, parameter: str, spec: ShardSpec, rank: int
) -> list[Piece]:
    """What ``rank`` holds of ``parameter``, in the file's terms."""
    module, kind = parameter.rsplit(".", 1)
    template, number = module_template(module)
    own = f"{template}.{kind}"
    files = naming.modules.get(own)
    if files is None and template in naming.modules:
        files = tuple(f"{name}.{kind}" for name in naming.modules[template])
    if files is None:
        raise ValueError(f"{config.family} checkpoints have no tensor for {parameter}")
    block = config.blocks[int(number)] if number else None
    if ".experts." not in template:
        names = [name.format(i=number) for name in files]
        return _of_tensor(naming, block, template, names, spec, rank)
    assert block is not None and isinstance(block.mlp, ExpertsSpec)
    one = spec if spec.dim is None else replace(spec, shape=spec.shape[1:], dim=spec.dim - 1)
    count, found = block.mlp.count, list[Piece]()
    for expert in range(count):
        names = [name.format(i=number, e=expert) for name in files]
        for piece in _of_tensor(naming, block, template, names, one, rank):
            stacked = "{e}" not in files[0]
            shape = (count, *piece.shape) if stacked else piece.shape
            found.append(replace(piece, expert=expert, stacked=stacked, shape=shape))
    return found


def _of_tensor(
    naming: Naming,
    of: BlockSpec | None,
    template: str,
    names: list[str],
    spec: ShardSpec,
    rank: int,
) -> list[Piece]:
    """What a rank holds of a parameter, or of one expert's part of it."""
    stored = "experts" if ".experts." in template else "blocks" if of is not None else "none"
    transposed = len(spec.shape) == 2 and naming.transposed == stored != "none"
    added = float(naming.centred_norms and template.endswith("norm"))
    if spec.dim is None:
        return [Piece(names[0], spec.shape, None, (), (0, spec.shape[0]), added=added)]
    found, offset = [], 0
    for index, (block, start) in enumerate(zip(spec.blocks, spec.local_offsets(rank), strict=True)):
        first, last = block.bounds[rank]
        ranges: tuple[Range, ...] = ((first, last),)
        length, step, phase = block.length, 1, 0
        if len(names) == 1 and len(spec.blocks) > 1:
            length = spec.shape[spec.dim]
            if naming.alternating and stored == "experts":
                step, phase = len(spec.blocks), index
            elif naming.fused == "interleaved":
                assert of is not None
                ranges = _interleaved(first, last, index, attention_of(of))
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
                step=step,
                phase=phase,
                transposed=transposed,
                pairs=attention_of(of).head_dim if paired and of is not None else None,
                added=added,
            )
        )
        offset += block.length
    return found


def _interleaved(first: int, last: int, index: int, attention: AttentionSpec) -> tuple[Range, ...]:
    """Rows of queries, keys or values (0, 1, 2) where the file holds, one KV head after the other,
    the query heads that read it, its key and its value.
    """
    dim, group = attention.head_dim, attention.num_heads // attention.num_kv_heads

    def place(head: int) -> int:
        kv, query = divmod(head, group) if index == 0 else (head, group + index - 1)
        return kv * (group + 2) + query

    heads = range(first // dim, last // dim)
    return tuple((place(head) * dim, (place(head) + 1) * dim) for head in heads)
