"""``from_pretrained``: a decoder from a Hugging Face directory or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch

from colrow.checkpoint.gguf_model import config_from_gguf, gguf_naming
from colrow.checkpoint.load import load_
from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.naming import hf_naming
from colrow.checkpoint.reader import open_reader
from colrow.mesh import Mesh, ParallelGroup
from colrow.models.build import DecoderOptions, resolve_mesh, resolve_pipeline
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.models.hf_config import config_from_file, read_config
from colrow.models.stages import LayerSplit


def from_pretrained(
    path: str | Path,
    mesh: Mesh | ParallelGroup | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    layer_split: str | Sequence[float] | LayerSplit | None = None,
    **options: Unpack[DecoderOptions],
) -> Decoder:
    """A decoder with the weights of a checkpoint; each rank reads only its own slices.

    It comes in evaluation mode, as from transformers: call ``model.train()`` for dropout.

    Args:
        path: a Hugging Face directory (safetensors, in one file or sharded), a hub id that is in
            the local cache, or a ``.gguf`` file.
        mesh: the grid of ranks, or just the tp group; by default one rank.
        dtype: of the parameters; by default the one that the configuration names, fp32 for GGUF.
        device: by default the mesh's, for a bare group torch's default device.
        layer_split: as for :func:`colrow.from_config`.
        options: see :class:`Decoder`.

    Raises:
        ValueError: nothing there, no weights or only pickled ones, an unknown architecture, or
            tensors that are missing, left over or mis-shaped.
        FileNotFoundError: weights without a ``config.json`` next to them.

    Sends nothing.
    """
    file = resolve_model_path(path)
    tp, place = resolve_mesh(mesh, device)
    with open_reader(file) as reader:
        if file.suffix == ".gguf":
            config = config_from_gguf(reader)
            naming = gguf_naming(config)
        else:
            config = config_from_file(_directory(file))
            naming = hf_naming(config)
        chosen = dtype or stored_dtype(file)
        pipeline = resolve_pipeline(config, mesh, layer_split)
        model = Decoder(config, tp, pipeline=pipeline, device=place, dtype=chosen, **options)
        if place.type != "meta":
            load_(model, reader, naming)
    return model.eval()


def pretrained_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint, without its weights. ``path`` may be a config.json."""
    if str(path).endswith(".json"):
        return config_from_file(path)
    file = resolve_model_path(path)
    if file.suffix == ".gguf":
        with open_reader(file) as reader:
            return config_from_gguf(reader)
    return config_from_file(_directory(file))


def stored_dtype(file: Path) -> torch.dtype:
    """The dtype that a checkpoint's configuration names; fp32 when it names none."""
    config = _directory(file) / "config.json"
    if file.suffix == ".gguf" or not config.exists():
        return torch.float32
    _, values = read_config(config.parent)
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _directory(file: Path) -> Path:
    return file if file.is_dir() else file.parent
