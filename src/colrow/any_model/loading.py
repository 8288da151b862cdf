"""A tensor-parallel model of any architecture, from files: the decoder, or transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow.any_model.configuration import describe_config
from colrow.any_model.in_place import InPlaceModel
from colrow.checkpoint.blocks import NO_KERNELS, why_not_quantised
from colrow.checkpoint.locate import find_weights, resolve_model_path
from colrow.checkpoint.opening import open_reader
from colrow.checkpoint.pretrained import from_pretrained, pretrained_config
from colrow.checkpoint.run_directory import CHECKPOINTS, MODEL_FILES, is_training_run, model_files
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.inplace.api import parallelize
from colrow.inplace.weights.load import allocate
from colrow.inplace.weights.meta import give_buffers, model_of, transformers_config
from colrow.models.build import from_config
from colrow.models.families import families
from colrow.models.hf_config import config_from_file, read_config
from colrow.models.interface import Description, TensorParallelModel
from colrow.models.staged_layers import describe
from colrow.models.stages import LayerSplit
from colrow.sharding import Sharding

_OF_DECODER = "embedding.weight"  # no model of transformers with a head has it outside of a part


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
    return values.get("model_type") in families()


def describe_model(
    path: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    in_place: bool = False,
    tensor_split: str | Sequence[float] | None = None,
    layer_split: str | Sequence[float] | None = None,
    sharding: Sharding | None = None,
    trust_remote_code: bool = False,
) -> Description:
    """What :func:`load_model` will make of a checkpoint, without its weights, before ranks start.

    Args:
        tp, pp: sizes of the mesh.
        The others as for :func:`load_model`.

    A ``config.json`` alone is described as well.

    Raises:
        ValueError: no weights there, a configuration that neither of the two can use, or one that
            cannot be divided so.
    """
    if is_training_run(path):
        in_place = _trained_in_place(path, asked=in_place)
        path = Path(path) / MODEL_FILES / "config.json"
    file = resolve_model_path(path)
    if file.suffix != ".json":
        find_weights(file)
    if not in_place and known_to_decoder(path):
        config = pretrained_config(path)
        config.divide(tp, tensor_split)
        LayerSplit.create(config, pp, layer_split)
        return describe(config)
    _refuse_gguf(file)
    found = describe_config(transformers_config(file, trust_remote_code=trust_remote_code))
    refuse_in_place(
        found, pp=pp, tensor_split=tensor_split, layer_split=layer_split, sharding=sharding
    )
    return found


def stays_quantised(
    path: str | Path, wanted: str, device: torch.device, *, in_place: bool = False
) -> tuple[bool, str]:
    """Whether the weights stay in the blocks of their file while text is generated.

    Args:
        wanted: "quantised", "auto" (where that is possible), or a dtype for plain weights.

    Returns:
        The answer, and for "auto" why not, where all that is missing is a package.
    """
    if wanted != "auto":
        return wanted == "quantised", ""
    file = resolve_model_path(path)
    if in_place or file.suffix != ".gguf" or device.type != "cpu":
        return False, ""
    with open_reader(file) as reader:
        refused = why_not_quantised(reader, device)
    return not refused, refused if refused == NO_KERNELS else ""


def refuse_in_place(
    model: Description,
    *,
    pp: int = 1,
    tensor_split: str | Sequence[float] | None = None,
    layer_split: str | Sequence[float] | None = None,
    sharding: Sharding | None = None,
) -> None:
    """Raises ValueError for what only the described families have; arguments as above."""
    asked = {
        f"a pipeline of {pp} stages": pp > 1,
        "a layer split": layer_split is not None,
        "a tensor split": tensor_split is not None,
        "gathering inputs again in backward": not Sharding.of(sharding).keep_gathered_input,
    }
    if refused := [name for name, value in asked.items() if value]:
        raise ValueError(
            f"{' and '.join(refused)}: for the described families only ({', '.join(families())}), "
            f"and this {model.name} is split in place, over equal tensor-parallel ranks (--tp)"
        )


def load_model(
    path: str | Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    quantised: bool = False,
    in_place: bool = False,
    sequence_parallel: bool = False,
    tensor_split: str | Sequence[float] | None = None,
    layer_split: str | Sequence[float] | None = None,
    sharding: Sharding | None = None,
    trust_remote_code: bool = False,
) -> TensorParallelModel:
    """The decoder where the checkpoint is of one of its families, else transformers' model, split.

    Its ``description`` says which. It comes in evaluation mode, and every rank reads its part.

    Args:
        path: a Hugging Face directory, a hub id that is in the local cache, a ``.gguf`` file, or
            the ``--output`` of ``colrow train``, whose newest checkpoint is taken.
        dtype: of the parameters; by default the one that the configuration names, or in which the
            run trained them.
        quantised: of the decoder, see :func:`colrow.from_pretrained`.
        in_place: take transformers' model also where the decoder knows the family.
        tensor_split, layer_split: of the decoder, see
            :func:`colrow.from_pretrained`; in place they are refused, and so is a pipeline.
        sequence_parallel: divide the tokens between the split layers too.
        sharding: this and more; in place nothing else is possible.
        trust_remote_code: run the Python code that comes with the checkpoint, for an architecture
            that transformers lacks.

    Raises:
        ValueError: as :func:`colrow.from_pretrained` and :func:`colrow.parallelize` do, and for
            what is not possible in place.

    Communicates: in place what :func:`colrow.parallelize` sends, and two small forward passes.
    """
    if is_training_run(path) and not quantised:
        return load_trained(
            path,
            mesh=mesh,
            dtype=dtype,
            in_place=in_place,
            tensor_split=tensor_split,
            layer_split=layer_split,
            sharding=Sharding.of(sharding, sequence_parallel),
        )[0]
    if not in_place and known_to_decoder(path):
        return from_pretrained(
            path,
            mesh,
            dtype=dtype,
            quantised=quantised,
            sequence_parallel=sequence_parallel,
            tensor_split=tensor_split,
            layer_split=layer_split,
            sharding=sharding,
        )
    if quantised:
        raise ValueError("weights stay quantised in GGUF files of the described families only")
    describe_model(
        path,
        pp=mesh.pp.size,
        in_place=True,
        tensor_split=tensor_split,
        layer_split=layer_split,
        sharding=sharding,
        trust_remote_code=trust_remote_code,
    )
    module = model_of(path, dtype, trust_remote_code=trust_remote_code)
    return split_in_place(
        module,
        mesh,
        weights=path,
        sequence_parallel=Sharding.of(sharding, sequence_parallel).sequence_parallel,
    )


def load_trained(
    run: str | Path,
    step: int | None = None,
    mesh: Mesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    in_place: bool = False,
    tensor_split: str | Sequence[float] | None = None,
    layer_split: str | Sequence[float] | None = None,
    sharding: Sharding | None = None,
) -> tuple[TensorParallelModel, int]:
    """The model of a training run in evaluation mode, and its step.

    Args:
        run: the ``--output`` of ``colrow train``.
        step: of the checkpoint; by default the newest.
        mesh: the grid of ranks, whatever the run's was; by default the whole model on the CPU.
        dtype: of the parameters; by default the one in which they were trained.
        The others as for :func:`load_model`.

    Raises:
        ValueError: no such run or checkpoint, or a damaged one.

    Communicates: as :meth:`colrow.checkpoint.training.TrainingCheckpoints.load` does.
    """
    mesh, files = mesh or alone(), model_files(run)
    checkpoints = TrainingCheckpoints(Path(run) / CHECKPOINTS, mesh)
    step = _step_of(run, checkpoints, step)
    dtype = dtype or checkpoints.dtype(step)
    model: TensorParallelModel
    if _trained_in_place(run, step, asked=in_place):
        module = model_of(files, dtype)
        refuse_in_place(
            describe_config(module.config),
            pp=mesh.pp.size,
            tensor_split=tensor_split,
            layer_split=layer_split,
            sharding=sharding,
        )
        give_buffers(module, None, mesh.device)
        allocate(module, _made_up(mesh))
        sequence_parallel = Sharding.of(sharding).sequence_parallel
        model = split_in_place(module, mesh, sequence_parallel=sequence_parallel)
        names = {name for name, _ in module.named_parameters()}
        if names != checkpoints.parameters(step):
            other = sorted(names ^ checkpoints.parameters(step))
            raise ValueError(
                f"{', '.join(other[:3])} of {checkpoints.path(step)} and of the run's "
                "configuration differ: they do not belong together"
            )
    else:
        config = config_from_file(files)
        checkpoints.check_shapes(step, config)
        model = from_config(
            config,
            mesh,
            dtype=dtype,
            layer_split=layer_split,
            tensor_split=tensor_split,
            sharding=sharding,
        )
    checkpoints.load(step, model.module, None)
    model.module.eval()
    return model, step


def alone() -> Mesh:
    """A grid of this process, on the CPU."""
    single = ParallelGroup.single
    return Mesh(single("tp"), single("dp"), single("pp"), None, torch.device("cpu"))


def _made_up(mesh: Mesh) -> Callable[[str, Tensor], Tensor]:
    """Values to split a model by, the same on all ranks; one rank alone needs none."""
    generator = torch.Generator().manual_seed(0)

    def values(name: str, like: Tensor) -> Tensor:
        found = torch.empty_like(like, device="cpu" if mesh.tp.size > 1 else mesh.device)
        if mesh.tp.size > 1:
            found.normal_(std=0.1, generator=generator)
        return found.to(mesh.device)

    return values


def _step_of(run: str | Path, checkpoints: TrainingCheckpoints, step: int | None) -> int:
    found = checkpoints.steps()
    if not found:
        raise ValueError(f"{run} has no checkpoints: give the --output of colrow train")
    if step not in (None, *found):
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {found}")
    return found[-1] if step is None else step


def _trained_in_place(run: str | Path, step: int | None = None, *, asked: bool) -> bool:
    """Whether a run trained transformers' own model.

    Raises:
        ValueError: it did not, and that is asked for.
    """
    checkpoints = TrainingCheckpoints(Path(run) / CHECKPOINTS, alone())
    parameters = checkpoints.parameters(_step_of(run, checkpoints, step))
    decoder = known_to_decoder(model_files(run)) and _OF_DECODER in parameters
    if asked and decoder:
        raise ValueError(
            f"{run} trained colrow's decoder, whose checkpoints are not transformers' own: for "
            f"--in-place write a directory first: colrow export {run} DIRECTORY"
        )
    return not decoder


def split_in_place(
    module: Any,
    mesh: Mesh,
    *,
    weights: str | Path | None = None,
    sequence_parallel: bool = False,
) -> InPlaceModel:
    """A model of transformers, split over ``mesh.tp``; arguments as :func:`colrow.parallelize`."""
    if not _kernels_take_experts(module, mesh.tp.size):
        module.set_experts_implementation("eager")
    parallelize(module, mesh, weights=weights, sequence_parallel=sequence_parallel)
    return InPlaceModel(module, mesh.tp)


def _kernels_take_experts(model: nn.Module, ranks: int) -> bool:
    """Whether fused kernels take the ranks' shares of stacked experts: no fp64, even strides."""
    stacks = [p for p in model.parameters() if p.dim() == 3]
    widths = {
        width for p in stacks for length in p.shape[1:] for width in (length, length // ranks)
    }
    uneven = any(length % ranks for p in stacks for length in p.shape[1:])
    size = stacks[0].element_size() if stacks else 0
    return not stacks or (size < 8 and not uneven and not any(w * size % 16 for w in widths))


def _refuse_gguf(file: Path) -> None:
    if file.suffix == ".gguf":
        raise ValueError(
            f"{file} is a GGUF file, which only the described families are read from "
            f"({', '.join(families())}); for transformers' own model write a directory first: "
            "colrow convert FILE DIRECTORY --to hf"
        )
