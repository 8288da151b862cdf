"""A stage of a decoder as ``torch.distributed.pipelining`` wants it, with its messages counted."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from colrow.comm.clock import Clock
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Phase
from colrow.layers.memory_saving import cast_parameters
from colrow.models.decoder import Decoder
from colrow.models.stages import Stage
from colrow.partition import Partition


class StageModule(nn.Module):
    """One stage of a decoder; the last one gives the loss, summed over tokens.

    Its parameters are the decoder's, which keeps their names.

    Args:
        model: the decoder; it is not a submodule.
        stage: one of its stages.
        compute_dtype, label_smoothing, z_loss: as for :class:`colrow.train.parallel.SummedLoss`.
        length: positions of a sequence.
    """

    def __init__(
        self,
        model: Decoder,
        stage: Stage,
        *,
        length: int,
        compute_dtype: torch.dtype | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = model.layers_of(stage)
        self.stage, self.length, self.compute_dtype = stage, length, compute_dtype
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self._model = (model,)  # in a tuple: registered it would be a submodule

    def forward(
        self, x: Tensor, *, labels: Tensor | None = None, dropout_key: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the next stage, or the loss.

        Args:
            x: token ids ``[batch, sequence]`` for the first stage, else hidden states
                ``[batch, sequence (_local), hidden]``.
            labels: ``[batch, sequence]``; the last stage needs them.
            dropout_key: ``[1]`` int64, of this microbatch.
        """
        (model,) = self._model
        key = None if dropout_key is None else dropout_key[0]
        blocks = list(model.blocks)
        outside = [m for layer in self.layers if layer not in blocks for m in layer.modules()]
        with cast_parameters(outside, self.compute_dtype):
            if not self.stage.is_last:
                hidden: Tensor = model(x, stage=self.stage, length=self.length, dropout_key=key)
                return hidden
            if labels is None:
                raise ValueError("the last stage of a pipeline needs the labels")
            return model.loss(
                x,
                labels,
                label_smoothing=self.label_smoothing if self.training else 0.0,
                z_loss=self.z_loss if self.training else 0.0,
                reduction="sum",
                dropout_key=key,
                stage=self.stage,
            )

    def hidden(self, microbatch: int, dtype: torch.dtype) -> Tensor:
        """What is passed between stages, as a meta tensor: under SP the shard of the sequence."""
        (model,) = self._model
        length = self.length
        if model.sequence_parallel:
            length = Partition.even(length, model.tp.size).size(model.tp.rank)
        return torch.empty(
            microbatch,
            length,
            model.config.hidden_size,
            dtype=dtype,
            device="meta",
            requires_grad=True,
        )


class Messages:
    """The messages that this rank's stages wait for, for the ledger of ``pp``.

    A message that is received counts from where it was asked for to where the computation that
    needs it begins; exposed is what lies behind the computation before. What is sent counts with
    its bytes: its time is the receiver's.
    """

    def __init__(self, pp: ParallelGroup) -> None:
        self._pp = pp
        self._awaited: dict[tuple[int, Phase, int], list[Clock]] = {}

    def sent(self, ops: list[dist.P2POp], layer: str, phase: Phase) -> None:
        """These are about to be sent."""
        for op in ops:
            clock = Clock.start("send", op.tensor, self._pp, layer, phase)
            if clock is not None:
                clock.done()

    def awaited(
        self, ops: list[dist.P2POp], layer: str, phase: Phase, stage: int, microbatch: int
    ) -> None:
        """These are about to be asked for, by a stage's next pass of this microbatch."""
        clocks = [Clock.start("recv", op.tensor, self._pp, layer, phase) for op in ops]
        found = [clock for clock in clocks if clock is not None]
        if found:
            self._awaited[stage, phase, microbatch] = found

    def begins(self, stage: int, phase: Phase, microbatch: int) -> None:
        """A pass begins: what it needed is there."""
        for clock in self._awaited.pop((stage, phase, microbatch), []):
            clock.done()

    def ends(self) -> None:
        """A pass is over: from here on this rank waits."""
        for clocks in self._awaited.values():
            for clock in clocks:
                clock.blocked()


class CountedStage(PipelineStage):
    """A stage whose messages are filed under the first block behind the cut that they cross.

    Arguments are those of torch's class, and ``messages``, one for all stages of a rank.
    """

    def __init__(self, module: StageModule, messages: Messages, **options: Any) -> None:
        stage = module.stage
        super().__init__(module, stage.index, stage.count, **options)
        self._messages = messages
        self._before, self._behind = f"blocks.{stage.start}", f"blocks.{stage.stop}"

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Torch's, counted."""
        ops = super().get_fwd_recv_ops(fwd_chunk_id)
        self._messages.awaited(ops, self._before, "forward", self.stage_index, fwd_chunk_id)
        return ops

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Torch's, counted."""
        ops = super().get_bwd_recv_ops(bwd_chunk_id)
        self._messages.awaited(ops, self._behind, "backward", self.stage_index, bwd_chunk_id)
        return ops

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Torch's, counted."""
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        self._messages.sent(ops, self._behind, "forward")
        return ops

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Torch's, counted."""
        ops = super().get_bwd_send_ops(bwd_chunk_id)
        self._messages.sent(ops, self._before, "backward")
        return ops

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Torch's, between two moments of the messages' account."""
        self._messages.begins(self.stage_index, "forward", fwd_chunk_id)
        result = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._messages.ends()
        return result

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Torch's, between two moments of the messages' account."""
        self._messages.begins(self.stage_index, "backward", bwd_chunk_id)
        result = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._messages.ends()
        return result

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Torch's, between two moments of the messages' account."""
        result = super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._messages.ends()
        return result
