"""The whole tensors that divided parameters are parts of, as the whole model has them.

An optimiser that looks at a whole matrix must look at the matrix of the published checkpoint, and a
checkpoint is put together of such tensors. The decoder keeps Q, K and V in one parameter where most
checkpoints have three, and some families store a matrix transposed or with its rows in another
order; a model that was split in place has the whole model's parameters under their names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from colrow.checkpoint.naming import hf_naming, pieces
from colrow.models.decoder import Decoder
from colrow.partition import Partition
from colrow.shards.boxes import Placement

Slices = tuple[slice, ...]
"""Of a matrix; in front of them the number of an expert, where a tensor holds many."""


@dataclass(frozen=True)
class TensorPart:
    """A rectangle of a whole tensor, in a rank's local tensor.

    Attributes:
        local: where it is there.
        whole: where it is in the whole tensor.
        transposed: the one is the other's transpose.
    """

    local: Slices
    whole: Slices
    transposed: bool

    def view(self, local: Tensor) -> Tensor:
        """The part in the local tensor, the way the whole tensor has it."""
        found = local[self.local]
        if len(found.shape) > len(self.whole):  # of an expert that is a tensor of its own
            found = found[0]
        return found.transpose(-1, -2) if self.transposed else found

    @property
    def shape(self) -> tuple[int, ...]:
        """The way the whole tensor has it."""
        return tuple(len(range(s.start, s.stop, s.step or 1)) for s in self.whole)


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of the whole model that is, or is a part of, one of this module's parameters.

    Attributes:
        name: of it.
        shape: of it.
        bands: ``(start, stop, at)``: indices of the parameter along ``dim`` that lie in one piece
            in this tensor, and where that begins; all of them by default.
        dim: the parameter's dimension that is divided.
        transposed: the parameter's matrices are stored as their transposes.
        step: of two indices of the parameter that are neighbours, how far those here are apart.
        expert: the index in the parameter's first dimension of which it is, where that holds many
            experts and this is one.
    """

    name: str
    shape: tuple[int, ...]
    bands: tuple[tuple[int, int, int], ...] = ()
    dim: int = 0
    transposed: bool = False
    step: int = 1
    expert: int | None = None

    def parts(self, place: Placement, *, owned: bool) -> tuple[TensorPart, ...]:
        """What a rank with this placement of the parameter holds of it.

        Args:
            owned: without what a lower tp rank holds too.
        """
        found = []
        for box in place.owned if owned else place.boxes:
            first = box.offsets[self.dim] if self.bands else 0
            last = first + box.sizes[self.dim] if self.bands else 0
            for start, stop, at in self.bands or ((0, 0, 0),):
                offsets, sizes, local = map(list, (box.offsets, box.sizes, box.local_offsets))
                if self.bands:
                    low, high = max(first, start), min(last, stop)
                    if low >= high:
                        continue
                    local[self.dim] += low - first
                    offsets[self.dim], sizes[self.dim] = at + self.step * (low - start), high - low
                if self.expert is not None:
                    if not 0 <= self.expert - offsets[0] < sizes[0]:
                        continue
                    local[0] += self.expert - offsets[0]
                    sizes[0] = 1
                whole = _slices(offsets, sizes, self.dim, self.step)
                if self.expert is not None:
                    whole = whole[1:]
                if self.transposed:
                    whole = (*whole[:-2], whole[-1], whole[-2])
                found.append(TensorPart(_slices(local, sizes), whole, self.transposed))
        return tuple(found)


def decoders_tensors(module: nn.Module) -> dict[str, tuple[WholeTensor, ...]]:
    """Those of every decoder inside ``module``, by the parameter's name."""
    found = {}
    for prefix, child in module.named_modules():
        if not isinstance(child, Decoder):
            continue
        naming = hf_naming(child.config)
        for name, spec in child.specs.items():
            blocks = tuple(Partition.even(block.length, 1) for block in spec.blocks)
            known: dict[str, WholeTensor] = {}
            for piece in pieces(naming, child.config, name, replace(spec, blocks=blocks), 0):
                if piece.stacked and piece.expert:
                    continue  # what the first expert says is true of all
                bands, start = [], piece.target[0]
                for first, last in piece.ranges:
                    at = piece.step * first + piece.phase
                    bands.append((start, start + last - first, at))
                    start += last - first
                before = known.get(piece.name)
                known[piece.name] = WholeTensor(
                    piece.name,
                    piece.shape,
                    (*(before.bands if before else ()), *bands),
                    spec.dim or 0,
                    piece.transposed,
                    piece.step,
                    None if piece.stacked else piece.expert,
                )
            found[f"{prefix}.{name}" if prefix else name] = tuple(known.values())
    return found


def _slices(offsets: list[int], sizes: list[int], dim: int = 0, step: int = 1) -> Slices:
    """The ranges, in steps along ``dim``."""
    return tuple(
        slice(at, at + step * (size - 1) + 1, step)
        if step > 1 and number == dim
        else slice(at, at + size)
        for number, (at, size) in enumerate(zip(offsets, sizes, strict=True))
    )
