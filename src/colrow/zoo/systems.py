"""Who splits the model: colrow, or transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.comm.mesh import Mesh
from colrow.verification.reference import prepare_reference, quiet_transformers
from colrow.zoo.architectures import without_dropout


@dataclass(frozen=True)
class System:
    """A way to make a model tensor-parallel.

    Attributes:
        split: the split model, from the whole one and the directory it was saved in ("" for one
            that was not).
        full_grads: whole gradients under the whole model's names, on rank 0.
        needs_directory: whether it starts from a saved model rather than from one in memory.
    """

    split: Callable[[nn.Module, str, Mesh], nn.Module]
    full_grads: Callable[[nn.Module], dict[str, Tensor]]
    needs_directory: bool


def _parallelize(model: nn.Module, directory: str, mesh: Mesh) -> nn.Module:
    """What the commands load from a saved text model; any other one is split as it is."""
    import colrow
    from colrow.checkpoint.any_model import load_model

    if not directory or type(model) not in _text_models():
        split: nn.Module = colrow.parallelize(model, mesh)
        return split
    dtype = next(model.parameters()).dtype
    loaded = load_model(directory, mesh, dtype=dtype, in_place=True).module
    return without_dropout(loaded).train()


def _text_models() -> set[type]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    classes = MODEL_FOR_CAUSAL_LM_MAPPING.values()
    return {cls for each in classes for cls in (each if isinstance(each, tuple) else (each,))}


def _full_grads(model: nn.Module) -> dict[str, Tensor]:
    import colrow

    grads: dict[str, Tensor] = colrow.full_grads(model)
    return grads


def load(model: nn.Module, directory: str, **options: Any) -> nn.Module:
    """The model of ``model``'s class that was saved in ``directory``, by transformers."""
    dtype = next(model.parameters()).dtype
    with quiet_transformers():
        loaded: nn.Module = type(model).from_pretrained(  # type: ignore[attr-defined]
            directory,
            dtype=dtype,
            experts_implementation="eager",
            local_files_only=True,
            **options,
        )
    return prepare_reference(loaded.to(dtype)).train()


def _transformers(model: nn.Module, directory: str, mesh: Mesh) -> nn.Module:
    from transformers.distributed import DistributedConfig

    return load(model, directory, distributed_config=DistributedConfig(tp_size=mesh.tp.size))


def _dtensor_grads(model: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return grads


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    if isinstance(parameter, DTensor):
        shard: Tensor = parameter.to_local()
        return shard
    return parameter


SYSTEMS = {
    "colrow": System(_parallelize, _full_grads, needs_directory=False),
    "transformers": System(_transformers, _dtensor_grads, needs_directory=True),
}
