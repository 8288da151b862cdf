"""Decoders from files and from configurations: the two ways to get one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import torch

from colrow.mesh import Mesh, ParallelGroup
from colrow.models.config import Layout, ModelConfig
from colrow.models.decoder import Decoder
from colrow.models.hf_config import config_from_file, config_from_hf
from colrow.models.initialize import initialize_


class _HasDict(Protocol):
    def to_dict(self) -> dict[str, object]: ...


class DecoderOptions(TypedDict, total=False):
    """Keyword arguments that are passed on to :class:`Decoder`."""

    layout: Layout
    sequence_parallel: bool
    keep_gathered_input: bool
    overlap: bool
    chunk_bytes: int | None
    check_inputs: bool


def from_config(
    config: ModelConfig | Mapping[str, object] | str | Path | _HasDict,
    mesh: Mesh | ParallelGroup | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **options: Unpack[DecoderOptions],
) -> Decoder:
    """A decoder with random weights; the same seed gives the same whole weights at any tp size.

    Args:
        config: a :class:`ModelConfig`, a transformers configuration, the contents of a
            ``config.json``, or the path of one.
        mesh: the grid of ranks, or just the tp group; by default one rank.
        seed: the same on all ranks of a tp group, which compare it.
        device: by default the mesh's; "meta" allocates nothing and draws nothing.
        options: see :class:`Decoder`.
    """
    if isinstance(config, str | Path):
        config = config_from_file(config)
    elif isinstance(config, Mapping):
        config = config_from_hf(config)
    elif not isinstance(config, ModelConfig):
        config = config_from_hf(config.to_dict())
    tp, place = resolve_mesh(mesh, device)
    model = Decoder(config, tp, device=place, dtype=dtype, **options)
    if place.type != "meta":
        initialize_(model, seed)
    return model


def resolve_mesh(
    mesh: Mesh | ParallelGroup | None, device: torch.device | str | None
) -> tuple[ParallelGroup, torch.device]:
    """The tp group and the device that are meant."""
    if isinstance(mesh, Mesh):
        return mesh.tp, torch.device(device) if device is not None else mesh.device
    place = torch.device("cpu" if device is None else device)
    return mesh or ParallelGroup.single(), place
