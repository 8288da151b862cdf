"""A tensor-parallel model of any architecture, from files: the decoder, or transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from colrow.checkpoint.locate import find_weights, resolve_model_path
from colrow.checkpoint.pretrained import from_pretrained, pretrained_config
from colrow.comm.mesh import Mesh
from colrow.inplace.api import parallelize
from colrow.inplace.meta import model_of, transformers_config
from colrow.inplace.model import InPlaceModel, describe_config
from colrow.models.families import FAMILIES
from colrow.models.hf_config import read_config
from colrow.models.interface import Description, TensorParallelModel
from colrow.models.staged_layers import describe


def known_to_decoder(path: str | Path) -> bool:
    """Whether the checkpoint is of a family that the decoder computes itself.

    Raises:
        ValueError: when there is no such checkpoint.
    """
    file = resolve_model_path(path)
    config = file
    if file.suffix != ".json":
        config = (file if file.is_dir() else file.parent) / "config.json"
    if file.suffix == ".gguf" or not config.is_file():
        return True
    try:
        _, values = read_config(config)
    except ValueError:
        return True  # whose reader says what is wrong with the file
    return values.get("model_type") in FAMILIES


def describe_model(
    path: str | Path, *, in_place: bool = False, trust_remote_code: bool = False
) -> Description:
    """What :func:`load_model` will make of a checkpoint, from its configuration; reads no weights.

    A ``config.json`` alone is described as well.

    Raises:
        ValueError: no weights there, or a configuration that neither of the two can use.
    """
    file = resolve_model_path(path)
    if file.suffix != ".json":
        find_weights(file)
    if not in_place and known_to_decoder(path):
        return describe(pretrained_config(path))
    _refuse_gguf(file)
    return describe_config(transformers_config(file, trust_remote_code=trust_remote_code))


def load_model(
    path: str | Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    in_place: bool = False,
    sequence_parallel: bool = False,
    tensor_split: str | Sequence[float] | None = None,
    layer_split: str | Sequence[float] | None = None,
    keep_gathered_input: bool = True,
    trust_remote_code: bool = False,
) -> TensorParallelModel:
    """The decoder where the checkpoint is of one of its families, else transformers' model, split.

    Its ``description`` says which. It comes in evaluation mode, and every rank reads its part.

    Args:
        path: a Hugging Face directory, a hub id that is in the local cache, or a ``.gguf`` file.
        dtype: of the parameters; by default the one that the configuration names.
        in_place: take transformers' model also where the decoder knows the family.
        tensor_split, layer_split, keep_gathered_input: of the decoder, see
            :func:`colrow.from_pretrained`; in place they are refused, and so is a pipeline.
        sequence_parallel: divide the tokens between the split layers too.
        trust_remote_code: run the Python code that comes with the checkpoint, for an architecture
            that transformers lacks.

    Raises:
        ValueError: as :func:`colrow.from_pretrained` and :func:`colrow.parallelize` do, and for
            what is not possible in place.

    Communicates: in place what :func:`colrow.parallelize` sends, and two small forward passes.
    """
    if not in_place and known_to_decoder(path):
        return from_pretrained(
            path,
            mesh,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
            tensor_split=tensor_split,
            layer_split=layer_split,
            keep_gathered_input=keep_gathered_input,
        )
    file = resolve_model_path(path)
    _refuse_gguf(file)
    refuse_in_place(
        describe_config(transformers_config(file, trust_remote_code=trust_remote_code)),
        pp=mesh.pp.size,
        tensor_split=tensor_split,
        layer_split=layer_split,
        recompute_gather=not keep_gathered_input,
    )
    model = model_of(path, dtype, trust_remote_code=trust_remote_code)
    return split_in_place(model, mesh, weights=path, sequence_parallel=sequence_parallel)


def split_in_place(
    module: Any,
    mesh: Mesh,
    *,
    weights: str | Path | None = None,
    sequence_parallel: bool = False,
) -> InPlaceModel:
    """A model of transformers, split over ``mesh.tp``; arguments as :func:`colrow.parallelize`."""
    if module.dtype == torch.float64:
        module.set_experts_implementation("eager")  # the fused kernels for experts know no fp64
    parallelize(module, mesh, weights=weights, sequence_parallel=sequence_parallel)
    return InPlaceModel(module, mesh.tp)


def refuse_in_place(
    model: Description,
    *,
    pp: int = 1,
    tensor_split: object = None,
    layer_split: object = None,
    recompute_gather: bool = False,
) -> None:
    """Raises ValueError for options that only the decoder's families have; None of them is set."""
    asked = {
        f"a pipeline of {pp} stages": pp > 1,
        "a layer split": layer_split is not None,
        "a tensor split": tensor_split is not None,
        "gathering inputs again in backward": recompute_gather,
    }
    if refused := [name for name, value in asked.items() if value]:
        raise ValueError(
            f"{' and '.join(refused)}: for the described families only ({', '.join(FAMILIES)}), "
            f"and this {model.name} is split in place, over equal tensor-parallel ranks (--tp)"
        )


def _refuse_gguf(file: Path) -> None:
    if file.suffix == ".gguf":
        raise ValueError(
            f"{file} is a GGUF file, which only the described families are read from "
            f"({', '.join(FAMILIES)}); for transformers' own model write a directory first: "
            "colrow convert FILE DIRECTORY --to hf"
        )
