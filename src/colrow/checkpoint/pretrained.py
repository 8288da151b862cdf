"""``from_pretrained``: a decoder from a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch

from colrow.checkpoint.blocks import keep_blocks_, quantised_division, why_not_quantised
from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.checkpoint.gguf_model import config_from_gguf
from colrow.checkpoint.load import check_tensors, load_
from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.mxfp4 import Mxfp4Reader
from colrow.checkpoint.naming import Naming, gguf_naming, hf_naming
from colrow.checkpoint.opening import open_reader
from colrow.checkpoint.reader import TensorReader
from colrow.checkpoint.tied_head import as_in_file
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
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
    quantised: bool = False,
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
        quantised: matrices stay in the blocks of a GGUF file, for generation on CPUs alone (see
            :mod:`colrow.layers.quantised`); ``dtype`` is then that of the activations.
        device: by default the mesh's, for a bare group torch's default device.
        layer_split: as for :func:`colrow.from_config`.
        options: see :class:`Decoder`.

    Raises:
        ValueError: nothing there, no weights or only pickled ones, an unknown architecture, or
            tensors that are missing, left over or mis-shaped;
            ``quantised`` for a file or a device that it is not possible for, or without ggml.
        FileNotFoundError: weights without a ``config.json`` next to them.

    Warns of experts in MXFP4, which become numbers of ``dtype``. Sends nothing.
    """
    file = resolve_model_path(path)
    tp, place = resolve_mesh(mesh, device)
    with open_reader(file) as reader:
        config, naming = _config_and_naming(file, reader)
        if place.type != "meta":
            check_tensors(config, reader, naming)
        chosen = dtype or stored_dtype(file)
        pipeline = resolve_pipeline(config, mesh, layer_split)
        if isinstance(reader, Mxfp4Reader) and tp.rank == 0:
            warnings.warn(
                f"{file}: the experts in MXFP4 become {str(chosen)[6:]} numbers", stacklevel=2
            )
        if quantised:
            if refused := why_not_quantised(reader, place):
                raise ValueError(f"the weights cannot stay quantised: {refused}")
            assert isinstance(reader, GGUFTensorReader)
            split = options.pop("tensor_split", None)
            if "division" not in options:
                divided = config.divide(tp.size, split)
                options["division"] = quantised_division(config, reader, naming, divided)
        model = Decoder(config, tp, pipeline=pipeline, device=place, dtype=chosen, **options)
        if quantised:
            assert isinstance(reader, GGUFTensorReader)
            keep_blocks_(model, reader, naming, chosen)
        if place.type != "meta":
            load_(model, reader, naming)
    return model.eval()


def pretrained_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint, without its weights. ``path`` may be a config.json.

    Where there are weights, the names and shapes of the tensors are compared with it. Where it says
    that embedding and head are tied, it is what :func:`from_pretrained` makes of them: untied if
    the file holds two different matrices.

    Raises:
        ValueError: as :func:`from_pretrained` does, but for weights that cannot be opened.
    """
    if str(path).endswith(".json"):
        return config_from_file(path)
    file = resolve_model_path(path)
    if file.suffix == ".gguf":
        with open_reader(file) as reader:
            return _checked_config(file, reader)
    config = config_from_file(_directory(file))
    try:
        reader = open_reader(file)
    except ValueError:  # no weights, or none that can be read: whoever loads them will hear of it
        return config
    with reader:
        return _checked_config(file, reader)


def _checked_config(file: Path, reader: TensorReader) -> ModelConfig:
    config, naming = _config_and_naming(file, reader)
    check_tensors(config, reader, naming)
    return config


def _config_and_naming(file: Path, reader: TensorReader) -> tuple[ModelConfig, Naming]:
    """What the configuration says, and where the file differs about a tied head, the file."""
    if file.suffix == ".gguf":
        config = config_from_gguf(reader)
        return config, gguf_naming(config)
    config = config_from_file(_directory(file))
    return as_in_file(config, hf_naming(config), reader)


def stored_dtype(file: Path) -> torch.dtype:
    """The dtype that a checkpoint's configuration names; fp32 when it names none.

    Raises:
        ValueError: one that a model does not compute in.
    """
    config = _directory(file) / "config.json"
    if file.suffix == ".gguf" or not config.exists():
        return torch.float32
    _, values = read_config(config.parent)
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if name.removeprefix("torch.") == str(dtype).removeprefix("torch."):
            return dtype
    raise ValueError(
        f"{config} has dtype {name!r}, which the decoder does not compute in: give dtype, one of "
        "float32, bfloat16, float16 and float64"
    )


def _directory(file: Path) -> Path:
    return file if file.is_dir() else file.parent
