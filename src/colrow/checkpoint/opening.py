"""Opens a checkpoint with the reader of its format."""

from __future__ import annotations

from pathlib import Path

from colrow.checkpoint.locate import find_weights, resolve_model_path
from colrow.checkpoint.mxfp4 import Mxfp4Reader, is_mxfp4
from colrow.checkpoint.reader import TensorReader
from colrow.checkpoint.safetensors_file import SafetensorsReader


def open_reader(path_or_id: str | Path) -> TensorReader:
    """Open a checkpoint for reading, without reading any tensor yet.

    Accepts what ``resolve_model_path`` and ``find_weights`` accept: a directory with safetensors
    (one file, or shards and their index), a ``.safetensors`` or ``.gguf`` file, or a hub id that
    is in the local cache. Experts in MXFP4 are read as the plain matrices that they mean.

    Raises:
        ValueError: nothing readable there, a damaged file, shards that contradict their index, or
            a GGUF file while the gguf package is not installed.
    """
    weights = find_weights(resolve_model_path(path_or_id))
    if weights.suffix == ".gguf":
        try:
            from colrow.checkpoint.gguf_file import GGUFTensorReader
        except ModuleNotFoundError as cause:
            raise ValueError(
                f"reading {weights} needs the package {cause.name}: pip install 'colrow[models]'"
            ) from cause
        return GGUFTensorReader(weights)
    stored = SafetensorsReader(weights)
    try:
        return Mxfp4Reader(stored) if is_mxfp4(stored) else stored
    except ValueError:
        stored.close()
        raise
