"""Decoders from files and from configurations: the two ways to get one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import torch

from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.layers.describe import Division
from colrow.models.config import ModelConfig, num_parameters
from colrow.models.decoder import Decoder
from colrow.models.hf_config import config_from_file, config_from_hf
from colrow.models.initialize import initialize_
from colrow.models.pipeline import Pipeline
from colrow.models.stages import LayerSplit
from colrow.sharding import Sharding


class _HasDict(Protocol):
    def to_dict(self) -> dict[str, object]: ...


class DecoderOptions(TypedDict, total=False):
    """Keyword arguments that are passed on to :class:`Decoder`."""

    division: Division
    tensor_split: str | Sequence[float] | None
    sequence_parallel: bool
    sharding: Sharding | None
    check_inputs: bool


def from_config(
    config: ModelConfig | Mapping[str, object] | str | Path | _HasDict,
    mesh: Mesh | ParallelGroup | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    layer_split: str | Sequence[float] | LayerSplit | None = None,
    **options: Unpack[DecoderOptions],
) -> Decoder:
    """A decoder with random weights; the same seed gives the same whole weights in any layout.

    With pipeline parallelism in the mesh it is this rank's part: see :class:`Decoder`.

    Args:
        config: a :class:`ModelConfig`, a transformers configuration, the contents of a
            ``config.json``, or the path of one.
        mesh: the grid of ranks, or just the tp group; by default one rank.
        seed: the same on all ranks of a tp and of a pp group, which compare it.
        device: by default the mesh's, for a bare group torch's default device; "meta" allocates
            nothing and draws nothing.
        layer_split: how the layers are divided over the pipeline's ranks: "3,1" for numbers of
            layers, "0.5,0.3,0.2" for shares; by default so that all ranks take equally long.
        options: see :class:`Decoder`.
    """
    if isinstance(config, str | Path):
        config = config_from_file(config)
    elif isinstance(config, Mapping):
        config = config_from_hf(config)
    elif not isinstance(config, ModelConfig):
        config = config_from_hf(config.to_dict())
    tp, place = resolve_mesh(mesh, device)
    pipeline = resolve_pipeline(config, mesh, layer_split)
    if place.type == "cpu":
        check_memory(config, mesh, dtype)
    model = Decoder(config, tp, pipeline=pipeline, device=place, dtype=dtype, **options)
    if place.type != "meta":
        initialize_(model, seed)
    return model


def check_memory(
    config: ModelConfig, mesh: Mesh | ParallelGroup | None, dtype: torch.dtype
) -> None:
    """Makes sure that a rank's share of the weights could lie in this machine's memory at all.

    Raises:
        ValueError: when it is larger than the whole memory.
    """
    ranks = mesh.tp.size * mesh.pp.size if isinstance(mesh, Mesh) else mesh.size if mesh else 1
    needed = num_parameters(config) * dtype.itemsize // ranks
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"the weights of this {config.family} model take {needed / 1e9:.0f} GB on each of "
            f"{ranks} ranks, and this machine has {memory / 1e9:.0f} GB of memory: use a smaller "
            "model or more ranks"
        )


def resolve_mesh(
    mesh: Mesh | ParallelGroup | None, device: torch.device | str | None
) -> tuple[ParallelGroup, torch.device]:
    """The tp group and the device that are meant."""
    if isinstance(mesh, Mesh):
        return mesh.tp, torch.device(device) if device is not None else mesh.device
    place = torch.get_default_device() if device is None else torch.device(device)
    return mesh or ParallelGroup.single(), place


def resolve_pipeline(
    config: ModelConfig,
    mesh: Mesh | ParallelGroup | None,
    layer_split: str | Sequence[float] | LayerSplit | None,
) -> Pipeline:
    """This rank's place in the pipeline that a mesh has.

    Raises:
        ValueError: a split that does not fit the model and the mesh, see :class:`LayerSplit`.
    """
    pp, ends = ParallelGroup.single("pp"), None
    if isinstance(mesh, Mesh):
        pp, ends = mesh.pp, mesh.ends
    if not isinstance(layer_split, LayerSplit):
        layer_split = LayerSplit.create(config, pp.size, layer_split)
    if sum(layer_split.sizes) != config.num_layers:
        raise ValueError(
            f"the layer split {list(layer_split.sizes)} is one of {sum(layer_split.sizes)} layers, "
            f"and the model has {config.num_layers}"
        )
    return Pipeline(layer_split, pp, ends)
