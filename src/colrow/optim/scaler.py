"""Loss scaling for fp16, with one decision for all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh


class GradScaler(torch.amp.GradScaler):
    """torch's gradient scaler for parameters that are divided over ranks.

    Each rank looks for infinities and nan in the gradients that it holds, and all ranks then learn
    whether any found one. So all of them skip the same steps and have the same scale, which a plain
    :class:`torch.amp.GradScaler` does not give: there a rank decides by its own shards.

    Use and ``state_dict`` are those of torch's class, with :func:`colrow.clip_grad_norm_` after
    :meth:`unscale_`, with several optimisers, and with gradient accumulation.

    Args:
        mesh: the grid of the ranks that train, or the group of those that must agree.
        device: "cuda" or "cpu"; by default the mesh's, and that of torch's default for a group.
        options: those of torch's class: ``init_scale``, ``growth_factor``, ``backoff_factor``,
            ``growth_interval``, ``enabled``.

    Communicates: one all-reduce of 4 bytes over all ranks of the mesh for each optimiser in each
    step, in :meth:`unscale_`, or in :meth:`step` without it. All ranks call them in the same order,
    also a pipeline stage that has no gradient.
    """

    def __init__(
        self, mesh: Mesh | ParallelGroup, device: str | None = None, **options: Any
    ) -> None:
        if not isinstance(mesh, Mesh | ParallelGroup):
            raise TypeError(
                f"colrow.GradScaler takes the mesh of the ranks that must agree first, not "
                f"{mesh!r}: colrow.GradScaler(mesh, device={device or 'cuda'!r})"
            )
        own = mesh.device if isinstance(mesh, Mesh) else torch.get_default_device()
        super().__init__(device or own.type, **options)
        self._group = mesh.world if isinstance(mesh, Mesh) else mesh

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As torch's. Also on a rank whose loss this scaler did not scale, as in a pipeline."""
        self._start(optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's: updates unless some rank found an infinity or nan in this optimiser's."""
        self._start(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def found_inf(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether some rank found an infinity or nan, after :meth:`unscale_`."""
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        return any(value.item() for value in found.values())

    def _start(self, optimizer: torch.optim.Optimizer) -> None:
        if self._enabled and self._scale is None:
            parameter = next(p for group in optimizer.param_groups for p in group["params"])
            self._lazy_init_scale_growth_tracker(parameter.device)

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        """Torch's, and then the maximum of what all ranks found, for all devices."""
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        here = [_plain(value).to(found_inf.device) for value in found.values()]
        mine = torch.stack([*here, found_inf]).amax().reshape(1)
        agreed = primitives.all_reduce(
            mine, self._group, op="max", layer="found_inf", phase="backward", in_place=True
        )[0]
        return {device: agreed.to(device) for device in (*found, found_inf.device)}


def _plain(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
