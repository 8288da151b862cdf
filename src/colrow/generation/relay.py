"""What the stages of a pipeline tell each other while they generate.

Hidden states go from a stage to the next one, ``[rows, new, hidden]`` on each tp rank to its
counterpart; the tokens that the last stage has chosen go to all others, which need them to know
when a row has ended. The batch is cut into as many parts as there are stages, which take turns, so
that every stage has one to work on while the others are elsewhere: GPipe's microbatches (Huang et
al. 2019) token by token, as in Aminabadi et al. 2022, "DeepSpeed Inference".
"""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.comm import point_to_point
from colrow.comm.group import ParallelGroup
from colrow.comm.primitives import Pending
from colrow.models.cache import KeyValueCache
from colrow.models.decoder import Decoder
from colrow.models.interface import Cache, TensorParallelModel
from colrow.models.stages import Stage
from colrow.partition import Partition


class RowGroup:
    """Rows of the batch that go through the pipeline together.

    Attributes:
        start, stop: which rows.
        skipped: columns on the left in which all of them have padding, and which are left out.
        mask: ``[rows, prompt + new]`` behind those, False at padding; None where none is left.
        cache: what this rank's layers keep of them.
        awaited: whether a token of theirs has been asked for and has not come back.
        sent: messages of their last turn, to be completed before their next one ends.
    """

    def __init__(
        self, start: int, stop: int, skipped: int, mask: Tensor | None, cache: Cache
    ) -> None:
        self.start, self.stop, self.skipped = start, stop, skipped
        self.mask, self.cache = mask, cache
        self.awaited = False
        self.sent: list[Pending] = []


class Relay:
    """This rank's place in the pipeline of a decoder; with one stage it sends nothing.

    Attributes:
        layout: how the model is divided, as far as the ranks have not compared it yet.

    Raises:
        ValueError: a rank with several stages.
    """

    def __init__(self, model: TensorParallelModel) -> None:
        self.model, self.layout = model, None
        self.pp, self.stage = ParallelGroup.single("pp"), Stage(0, 1, 0, 0)
        self._short_texts: int | None = None
        if not isinstance(model, Decoder):
            return
        if len(model.stages) > 1:
            raise ValueError(
                f"this rank holds {len(model.stages)} pipeline stages: generation needs one on "
                "each rank, so load the model with a layer split of one number for each rank"
            )
        self.layout = (model.division, model.pipeline.split)
        self._short_texts = model.config.short_texts
        self.pp, self.stage = model.pipeline.pp, model.stages[0]

    def parts(self, batch: int, capacity: int, mask: Tensor | None) -> list[list[RowGroup]]:
        """The batch, cut so that all stages are busy where it has enough rows.

        Where the model cannot take padding, each row is a part of its own.

        Returns:
            Parts that take turns, together; such groups come one after the other, since some models
            keep in themselves what they know of the text.

        Args:
            capacity: positions of the prompt and of the new tokens.
            mask: ``[batch, capacity]``, False at padding on the left; None without any.
        """
        alone = mask is not None and not self.model.takes_padding
        bounds = Partition.even(batch, batch if alone else min(batch, self.pp.size)).bounds
        found = []
        for start, stop in bounds:
            skipped, own = 0, None if mask is None else mask[start:stop]
            if own is not None:
                skipped = int((~own).sum(dim=1).min())
                own = None if bool(own[:, skipped].all()) else own[:, skipped:]
            cache = self.model.make_cache(stop - start, capacity - skipped)
            found.append(RowGroup(start, stop, skipped, own, cache))
        return [[part] for part in found] if alone else [found]

    def starts_over(self, part: RowGroup, past: int) -> bool:
        """Whether these rows, now of ``past`` tokens, must go through the model anew; empties
        their cache if so.

        LongRoPE's factors are others for texts beyond a length, also for the tokens before it; what
        the cache holds was rotated with those for shorter ones.
        """
        if past - 1 != self._short_texts:
            return False
        assert isinstance(part.cache, KeyValueCache)
        part.cache.clear()
        return True

    def receive_hidden(self, part: RowGroup, new: int) -> Tensor:
        """``[rows, new, hidden]`` from the stage before."""
        model = self.model.module
        assert isinstance(model, Decoder)
        like = next(model.parameters())
        shape = (part.stop - part.start, new, model.config.hidden_size)
        buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        return point_to_point.recv(
            buffer, self.pp, self.pp.rank - 1, layer=self._cut(self.stage.start)
        )

    def send_hidden(self, part: RowGroup, hidden: Tensor) -> None:
        """To the next stage, from which this one will hear of tokens."""
        _complete(part)
        message = point_to_point.send_async(
            hidden, self.pp, self.pp.rank + 1, layer=self._cut(self.stage.stop)
        )
        part.sent, part.awaited = [message], True

    def send_tokens(self, part: RowGroup, tokens: Tensor) -> None:
        """``[rows]`` int64 to all other stages. From the CPU: no stage needs them elsewhere."""
        _complete(part)
        part.sent = [
            point_to_point.send_async(tokens, self.pp, rank, layer="tokens")
            for rank in range(self.pp.size - 1)
        ]

    def receive_tokens(self, part: RowGroup) -> list[int] | None:
        """The tokens that the last stage chose for these rows; None when none are on their way."""
        if not part.awaited:
            return None
        part.awaited = False
        buffer = torch.empty(part.stop - part.start, dtype=torch.int64, device="cpu")
        found: list[int] = point_to_point.recv(
            buffer, self.pp, self.pp.size - 1, layer="tokens"
        ).tolist()
        return found

    def finish(self, parts: list[RowGroup]) -> None:
        """Completes the last messages."""
        for part in parts:
            _complete(part)

    @staticmethod
    def _cut(block: int) -> str:
        return f"blocks.{block - 1}|{block}"


def _complete(part: RowGroup) -> None:
    for message in part.sent:
        message.wait()
    part.sent = []
