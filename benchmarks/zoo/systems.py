"""Who splits the model: colrow, or transformers itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.comm.mesh import Mesh
from colrow.verification.in_place import COLROW, System, load_saved


def _transformers(model: nn.Module, directory: str, mesh: Mesh) -> nn.Module:
    from transformers.distributed import DistributedConfig

    return load_saved(model, directory, distributed_config=DistributedConfig(tp_size=mesh.tp.size))


def _dtensor_grads(model: nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return grads


TRANSFORMERS = System("transformers", _transformers, _dtensor_grads, needs_directory=True)
SYSTEMS = {system.name: system for system in (COLROW, TRANSFORMERS)}
