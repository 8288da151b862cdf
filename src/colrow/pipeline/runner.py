"""Gradients of a step, and losses without gradients, through the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colrow.comm import point_to_point
from colrow.comm.mesh import Mesh
from colrow.comm.primitives import Pending
from colrow.layers.block import prepare_blocks
from colrow.layers.memory_saving import Recompute
from colrow.models.decoder import Decoder
from colrow.models.stages import Stage
from colrow.models.tied import sum_tied_gradients_
from colrow.pipeline.limits import ZERO_BUBBLE, check_schedule
from colrow.pipeline.replicas import sum_replicas_
from colrow.pipeline.schedules import Schedule
from colrow.pipeline.stage import CountedStage, Messages, StageModule
from colrow.pipeline.torch_schedules import build_schedule
from colrow.shards.over_dp import shard_over_dp


class PipelineRunner:
    """Takes the microbatches of a step through this rank's stages.

    Args:
        model: the decoder of this rank's stages, made with ``overlap=False`` for a zero-bubble
            schedule with tp > 1: split backward runs each autograd function of the layers' fused
            form twice, with what it sends.
        mesh: its grid.
        schedule: see :data:`colrow.pipeline.schedules.SCHEDULES`.
        microbatches: of a dp rank in a step.
        microbatch, sequence: sequences in one, and their length.
        fsdp: divide parameters, gradients and optimiser state over dp (FSDP2); otherwise every dp
            rank has them, and sums its gradients over dp when the step has gone back.
        compute_dtype, recompute, label_smoothing, z_loss: as for
            :func:`colrow.layers.block.prepare_blocks`.

    Raises:
        ValueError: combinations that cannot run, see
            :func:`colrow.pipeline.limits.check_schedule`.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        schedule: Schedule,
        *,
        microbatches: int,
        microbatch: int,
        sequence: int,
        fsdp: bool = False,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = "none",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        self.model, self.mesh = model, mesh
        self.split = model.pipeline.split
        self.sharded = fsdp and mesh.dp.size > 1
        if mesh.pp.size > 1 and mesh.pp.cuda_by_gloo and mesh.device.type == "cuda":
            raise ValueError(
                "pipeline stages send each other messages, and Gloo does not take them from a "
                "GPU: use engine='nccl' with a GPU for each rank, or device='cpu'"
            )
        check_schedule(
            schedule,
            self.split,
            microbatches,
            recompute=recompute,
            fsdp=self.sharded,
            tied=model.config.tie_embeddings,
        )
        self._later = schedule in ZERO_BUBBLE
        if self._later and model.sharding.overlap and mesh.tp.size > 1:
            raise ValueError(
                f"schedule={schedule} with tp={mesh.tp.size} needs a model made with "
                "sharding=Sharding(overlap=False):"
                " each collective is then a node of the graph of its own, and issued once"
            )
        model.sums_shared_later = self._later
        prepare_blocks(
            model.blocks, sharded=self.sharded, compute_dtype=compute_dtype, recompute=recompute
        )
        if self._later:
            for block in model.blocks:
                block.own_bucket = False  # type: ignore[assignment]
        self._dtype = compute_dtype or next(model.parameters()).dtype
        self._scale = 1.0
        self.modules = [
            StageModule(
                model,
                stage,
                length=sequence,
                compute_dtype=None if self.sharded else compute_dtype,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
            )
            for stage in model.stages
        ]
        if self.sharded:
            shard_over_dp([*model.blocks, *self.modules], mesh, compute_dtype)
        messages = Messages(mesh.pp)
        self.stages = [self._stage(module, messages, microbatch) for module in self.modules]
        self._shapes = [(microbatch, sequence)] * microbatches
        self.schedule = build_schedule(schedule, self.stages, microbatches, self._scaled)

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is on this rank."""
        return any(stage.is_last for stage in self.model.stages)

    def backward(self, batches: Sequence[tuple[Tensor, Tensor, int]], scale: float) -> list[Tensor]:
        """Gradients of the loss summed over all microbatches of all dp ranks, times ``scale``.

        Args:
            batches: ids, labels ``[microbatch, sequence]`` and dropout key of each microbatch of
                this dp rank, the same on all its tp and pp ranks.

        Returns:
            The summed loss of each microbatch on the ranks of the last stage, else nothing.

        Raises:
            ValueError: other microbatches than those that the runner was made for, or parameters
                with gradients of a step before.

        Communicates: as the layers do, hidden states and their gradients between stages, and then
        the gradients of tied embeddings and replicas (see :mod:`colrow.pipeline.replicas`).
        """
        self._check(batches)
        # FSDP2 takes the mean over dp.
        self._scale = scale * (self.mesh.dp.size if self.sharded else 1)
        ids = torch.cat([batch[0] for batch in batches])
        labels = torch.cat([batch[1] for batch in batches])
        keys = torch.tensor([batch[2] for batch in batches], device=ids.device)
        losses: list[Tensor] = []
        first = any(stage.is_first for stage in self.model.stages)
        targets: dict[str, Any] = {"target": labels, "losses": losses} if self.has_loss else {}
        inputs = {"labels": labels} if self.has_loss else {}
        self.schedule.step(
            *([ids] if first else []),
            dropout_key=keys,
            **inputs,
            **targets,
            return_outputs=False,
        )
        if self._later:
            self.model.sum_shared_gradients_()
        sum_tied_gradients_(self.model)
        if not self.sharded:
            sum_replicas_(self.model, self.mesh.dp)
        return [loss.detach() / self._scale for loss in losses]

    @torch.no_grad()
    def losses(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The summed loss of each microbatch on the ranks of the last stage, else nothing.

        In evaluation mode: without dropout, label smoothing and z-loss.

        Communicates: as forward passes do, and hidden states between stages.
        """
        for module in self.modules:
            module.eval()
        self.model.eval()
        sending: list[Pending] = []
        here: list[Tensor] = []
        for module in self.modules:  # all microbatches through a stage, then the next stage
            here = self._through(module, here, batches, sending)
        for message in sending:
            message.wait()
        self.model.train()
        for module in self.modules:
            module.train()
        return here if self.has_loss else []

    def _check(self, batches: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        shapes = [tuple(batch[0].shape) for batch in batches]
        if shapes != self._shapes:
            raise ValueError(
                f"this pipeline takes microbatches of the shapes {self._shapes}, not {shapes}"
            )
        # What follows the schedule sums whole gradients over ranks: older ones would count again.
        if any(parameter.grad is not None for parameter in self.model.parameters()):
            raise ValueError(
                "the parameters have gradients of a step before, which sums over ranks would count "
                "again: call zero_grad() first, and give all microbatches of a step at once"
            )

    def _through(
        self,
        module: StageModule,
        here: list[Tensor],
        batches: Sequence[tuple[Tensor, Tensor]],
        sending: list[Pending],
    ) -> list[Tensor]:
        """All microbatches through one stage; ``here`` is the result of the stage before it."""
        stage, pp, found = module.stage, self.mesh.pp, []
        before, behind = (self._rank_of(stage.index + step) for step in (-1, 1))
        for number, (ids, labels) in enumerate(batches):
            if stage.is_first:
                x = ids
            elif before == pp.rank:
                x = here[number]
            else:
                like = module.hidden(ids.shape[0], self._dtype)
                buffer = torch.empty(like.shape, dtype=like.dtype, device=ids.device)
                x = point_to_point.recv(buffer, pp, before, layer=f"blocks.{stage.start}")
            y = module(x, labels=labels if stage.is_last else None)
            if not stage.is_last and behind != pp.rank:
                sending.append(
                    point_to_point.send_async(y, pp, behind, layer=f"blocks.{stage.stop}")
                )
            else:
                found.append(y)
        return found

    def _rank_of(self, stage: int) -> int:
        return self.split.rank_of(stage) if 0 <= stage < len(self.split.sizes) else -1

    def _scaled(self, loss: Tensor, labels: Tensor) -> Tensor:
        """What the schedule takes as its loss: the last stage has computed it."""
        return loss * self._scale

    def _stage(self, module: StageModule, messages: Messages, microbatch: int) -> CountedStage:
        hidden = module.hidden(microbatch, self._dtype)
        ids = torch.empty(microbatch, module.length, dtype=torch.int64, device="meta")
        wide = torch.promote_types(self._dtype, torch.float32)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        stage: Stage = module.stage
        return CountedStage(
            module,
            messages,
            device=self.mesh.device,
            group=self.mesh.pp.group,
            input_args=ids if stage.is_first else hidden,
            output_args=loss if stage.is_last else hidden,
        )
