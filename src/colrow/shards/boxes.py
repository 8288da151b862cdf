"""Where the local tensor of a parameter lies in the whole one: tensor parallelism, then FSDP2.

A parameter is divided twice. Its :class:`~colrow.partition.ShardSpec` says which ranges a tp rank
holds; FSDP2 then divides the rows of that shard over the dp ranks. Composing the two gives boxes:
rectangles of the whole tensor. Gradient norms count each element once by them, and checkpoints are
written and read by them, so neither depends on how a shard came about or whether it is even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from colrow.comm.compat import as_dtensor, local_tensor
from colrow.comm.group import ParallelGroup
from colrow.partition import Range, ShardSpec
from colrow.shards.model_shards import shards_for, shards_of


@dataclass(frozen=True)
class Box:
    """A rectangle of a whole tensor that lies in one piece in a rank's local tensor.

    Attributes:
        offsets: its first index in the whole tensor.
        sizes: its extent.
        local_offsets: its first index in the local tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_offsets: tuple[int, ...]

    def view(self, local: Tensor) -> Tensor:
        """The box in the local tensor."""
        return local[tuple(map(slice, self.local_offsets, self._ends()))]

    def _ends(self) -> list[int]:
        return [start + size for start, size in zip(self.local_offsets, self.sizes, strict=True)]


@dataclass(frozen=True)
class Placement:
    """What one rank holds of a parameter, its gradient, or a state of its shape.

    Attributes:
        spec: how the parameter is divided over tp.
        tp_rank: this rank's number in that.
        rows: the half-open range of rows of the tp shard that this dp rank holds under FSDP2;
            None when it holds all of them.
        declared: something says that it is divided so; otherwise it counts as held by every rank,
            which is to be checked, see :mod:`colrow.shards.same`.
    """

    spec: ShardSpec
    tp_rank: int = 0
    rows: Range | None = None
    declared: bool = True

    @property
    def boxes(self) -> tuple[Box, ...]:
        """All that the local tensor holds."""
        spec = self.spec
        if spec.dim is None:
            return self._in_rows([((0,) * len(spec.shape), spec.shape, (0,) * len(spec.shape))])
        return self._along([(a, b, at) for (a, b), at in self._ranges()])

    @property
    def owned(self) -> tuple[Box, ...]:
        """As :attr:`boxes`, without what a lower tp rank holds too: each element has one owner."""
        spec = self.spec
        if spec.dim is None:
            return self.boxes if self.tp_rank == 0 else ()
        pieces, base = [], 0
        for block, (held, at) in zip(spec.blocks, self._ranges(), strict=True):
            below = [(base + a, base + b) for a, b in block.bounds[: self.tp_rank]]
            pieces += [(a, b, at + a - held[0]) for a, b in _subtract(held, below)]
            base += block.length
        return self._along(pieces)

    def _ranges(self) -> list[tuple[Range, int]]:
        """Each block's range in the whole tensor, and where it begins in the tp shard."""
        spec, rank = self.spec, self.tp_rank
        return list(zip(spec.global_ranges(rank), spec.local_offsets(rank), strict=True))

    def _along(self, pieces: list[tuple[int, int, int]]) -> tuple[Box, ...]:
        """Boxes from ``(start, stop, local start)`` along the divided dimension."""
        dim, shape = self.spec.dim, self.spec.shape
        assert dim is not None
        found = []
        for start, stop, at in pieces:
            offsets, sizes, local = [0] * len(shape), list(shape), [0] * len(shape)
            offsets[dim], sizes[dim], local[dim] = start, stop - start, at
            found.append((tuple(offsets), tuple(sizes), tuple(local)))
        return self._in_rows(found)

    def _in_rows(self, found: Sequence[tuple[tuple[int, ...], ...]]) -> tuple[Box, ...]:
        """The parts of boxes of the tp shard that lie in this dp rank's rows."""
        boxes = []
        for offsets, sizes, local in found:
            if self.rows is not None:
                first = max(self.rows[0], local[0])
                last = min(self.rows[1], local[0] + sizes[0])
                offsets = (offsets[0] + first - local[0], *offsets[1:])
                sizes = (max(0, last - first), *sizes[1:])
                local = (first - self.rows[0], *local[1:])
            if 0 not in sizes:
                boxes.append(Box(offsets, sizes, local))
        return tuple(boxes)


def placements(module: nn.Module) -> dict[str, Placement]:
    """Every parameter's placement, under the names of ``module.named_parameters()``.

    colrow's layers say how a parameter is divided (``weight_spec`` beside ``weight``), and so may
    any module; a model that was split in place knows it by name. Other parameters count as the same
    on every tp rank, but are not ``declared`` so.

    Raises:
        ValueError: when a parameter has another shape than its placement says, is a DTensor that
            FSDP2 did not make, or was split in place and has gone.
    """
    tp_rank = tensor_parallel_group(module).rank
    known, parameters = divisions(module), dict(module.named_parameters())
    return {
        name: replace(_placement(name, parameters[name], spec, tp_rank), declared=declared)
        for name, (spec, declared) in known.items()
    }


def divisions(module: nn.Module) -> dict[str, tuple[ShardSpec, bool]]:
    """How every parameter is divided over tp, and whether something says so.

    Raises:
        ValueError: when a parameter was split in place and has gone.
    """
    wanted = dict(module.named_parameters())
    there = {name for name, _ in module.named_parameters(remove_duplicate=False)}  # tied ones too
    in_place: dict[str, ShardSpec] = {}
    whole: set[str] = set()
    inside = [(prefix, shards_of(child)) for prefix, child in module.named_modules()]
    for prefix, shards in [("", shards_for(module)), *inside]:
        for name, divided in shards.specs.items() if shards is not None else ():
            full = f"{prefix}.{name}" if prefix else name
            if full not in there:
                raise ValueError(
                    f"{full} was split by colrow.parallelize and is not there any more: modules "
                    "that wrap others, such as LoRA adapters, are to be added before the split"
                )
            in_place[full] = divided
        for name in shards.whole if shards is not None else ():
            whole.add(f"{prefix}.{name}" if prefix else name)
    by_tensor = _declared(module)
    found = {}
    for full, parameter in wanted.items():
        spec = in_place.get(full) or by_tensor.get(id(parameter))
        declared = spec is not None or full in whole
        found[full] = spec or ShardSpec.replicated(*parameter.shape), declared
    return found


def buffer_placements(module: nn.Module) -> dict[str, Placement]:
    """As :func:`placements`, for the buffers that belong to the module's state."""
    tp_rank, by_tensor = tensor_parallel_group(module).rank, _declared(module)
    found: dict[str, Placement] = {}
    for full, buffer in module.named_buffers():
        prefix, _, name = full.rpartition(".")
        if name not in module.get_submodule(prefix)._non_persistent_buffers_set:
            spec = by_tensor.get(id(buffer))
            declared, spec = spec is not None, spec or ShardSpec.replicated(*buffer.shape)
            found[full] = replace(_placement(full, buffer, spec, tp_rank), declared=declared)
    return found


def _declared(module: nn.Module) -> dict[int, ShardSpec]:
    """What modules say themselves about a parameter or buffer, by its id: it may be tied."""
    found: dict[int, ShardSpec] = {}
    for prefix, child in module.named_modules():
        for name, tensor in (*child._parameters.items(), *child._buffers.items()):
            spec = getattr(child, f"{name}_spec", None) if tensor is not None else None
            if isinstance(spec, ShardSpec) and found.setdefault(id(tensor), spec) != spec:
                raise ValueError(
                    f"{prefix}.{name} is tied to a parameter that is divided otherwise: their "
                    f"{name}_spec must be equal"
                )
    return found


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return module


def tensor_parallel_group(module: nn.Module) -> ParallelGroup:
    """The group that the layers inside ``module`` share; one rank when there is none.

    Raises:
        ValueError: when its layers have different groups.
    """
    handles = [getattr(child, "tp", None) for child in module.modules()]
    split = [shards_for(module), *map(shards_of, module.modules())]
    handles += [shards.tp for shards in split if shards is not None]
    groups = [handle for handle in handles if isinstance(handle, ParallelGroup)]
    if any(group.group is not groups[0].group for group in groups):
        raise ValueError("the layers of this module have different tensor-parallel groups")
    return groups[0] if groups else ParallelGroup.single()


def data_parallel_group(module: nn.Module) -> ParallelGroup:
    """The group over which FSDP2 divides the parameters of ``module``; one rank without FSDP2."""
    for parameter in module.parameters():
        if (divided := as_dtensor(parameter)) is not None:
            mesh = divided.device_mesh
            return ParallelGroup(mesh.get_group(), mesh.get_local_rank(), mesh.size(), "dp")
    return ParallelGroup.single("dp")


def _placement(name: str, parameter: Tensor, spec: ShardSpec, tp_rank: int) -> Placement:
    shape = spec.local_shape(tp_rank)
    if tuple(parameter.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, but tp rank {tp_rank} should hold {shape}"
        )
    divided = as_dtensor(parameter)
    if divided is None:
        return Placement(spec, tp_rank)
    mesh, (placed, *more) = divided.device_mesh, divided.placements
    if mesh.ndim != 1 or more or not placed.is_shard(0):
        raise ValueError(
            f"{name} is placed as {divided.placements}: only rows divided over one mesh "
            "dimension are supported, as fully_shard(module, mesh=mesh.device_mesh['dp']) makes"
        )
    size, rank = mesh.size(), mesh.get_local_rank()
    chunk = -(-shape[0] // size)  # FSDP2 divides rows as torch.chunk does
    rows = (min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0]))
    if local_tensor(parameter).shape[0] != rows[1] - rows[0]:
        raise ValueError(
            f"dp rank {rank} holds {local_tensor(parameter).shape[0]} rows of {name}, not those of "
            f"{rows}: FSDP2 divided it in an unknown way (torch {torch.__version__})"
        )
    return Placement(spec, tp_rank, rows)


def _subtract(held: Range, others: list[Range]) -> list[Range]:
    """What is left of ``held`` without the other ranges."""
    left = [held] if held[0] < held[1] else []
    for start, stop in others:
        pieces = [piece for a, b in left for piece in ((a, min(b, start)), (max(a, stop), b))]
        left = [(a, b) for a, b in pieces if a < b]
    return left
