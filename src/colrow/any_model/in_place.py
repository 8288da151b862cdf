"""A causal language model of transformers that was split in place, as the commands see it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from colrow.any_model.configuration import describe_config, plain_tokens
from colrow.any_model.continuation import Continuation
from colrow.any_model.predicted_calls import predict
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call
from colrow.inplace.apply.layers import HeadMixin
from colrow.inplace.apply.record import record_of
from colrow.inplace.observe.modes import arithmetic_of, evaluating
from colrow.layers.loss import Reduction, vocab_parallel_cross_entropy
from colrow.models.communication import LOSS_STATISTICS
from colrow.models.inputs import check_labels, check_next_token
from colrow.models.interface import Description, PredictedCalls
from colrow.partition import Partition, ShardSpec

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_OF_16_BITS = 2e-2


class InPlaceModel:
    """See :class:`colrow.models.interface.TensorParallelModel`; forward passes are the model's own.

    Where one head was divided and the model's code hands on what it gives element by element, which
    a small pass shows, no rank has whole logits while it generates or trains. Otherwise each rank
    has them whole, and works on its range of them.

    Args:
        module: what :func:`colrow.parallelize` has split, with its weights.
        tp: the group that it was split over.

    Raises:
        ValueError: a model that does not continue a text.

    Communicates: with a divided head, what two small forward passes send; all ranks make one.
    """

    def __init__(self, module: nn.Module, tp: ParallelGroup) -> None:
        self.tp, self._module = tp, module
        self._description = describe_config(module.config)
        can: Any = getattr(module, "can_generate", None)
        if not callable(can) or not can():
            raise ValueError(f"{type(module).__name__} has no head that continues a text")
        record = record_of(module)
        self._specs = {} if record is None else record.specs
        heads = [m for m in module.modules() if isinstance(m, HeadMixin)]
        self._head = heads[0] if len(heads) == 1 else None
        self._local = False
        if self._head is not None:
            self._head.register_forward_pre_hook(self._open_head)
            self._head.register_forward_hook(self._close_head, always_call=True)
        if self._head is not None and not self._hands_on():
            self._head = None

    @property
    def description(self) -> Description:
        """What its configuration says."""
        return self._description

    @property
    def module(self) -> nn.Module:
        """The model of transformers."""
        return self._module

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self._module.parameters()).device

    @functools.cached_property
    def vocabulary(self) -> Partition:
        """Which tokens' logits each rank has."""
        if self._head is not None:
            return self._head.colrow.partition
        return Partition.even(self._first_logits(local=False).shape[-1], self.tp.size)

    @functools.cached_property
    def blocks(self) -> tuple[nn.Module, ...]:
        """What the model's outermost lists of modules hold."""
        return tuple(_blocks(self._module))

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(spec.shape) for _, spec in self.shards().values())

    def arithmetic(self) -> AbstractContextManager[object]:
        """Inside it what transformers computes in fp32 is fp64 where the parameters are."""
        return arithmetic_of(self._module)

    @functools.cached_property
    def takes_padding(self) -> bool:
        """Whether rows that are padded on the left get the logits that they get alone.

        Tried with a few tokens, and on a tiny model of the architecture; the ranks decide together.
        """
        from colrow.any_model.padding import architecture_takes_padding, padding_error

        def step(ids: Tensor, mask: Tensor | None, text: Continuation) -> Tensor:
            return self.last_logits(ids, attention_mask=mask, cache=text)

        error, vocab_size = float("inf"), self._description.vocab_size
        if architecture_takes_padding(self._description.name):
            try:
                with evaluating(self._module):
                    error = padding_error(step, vocab_size, self.device, 2)
            except (RuntimeError, NotImplementedError):  # of shapes that do not fit
                pass
        mine = torch.tensor([error], device=self.device)
        worst = primitives.all_reduce(mine, self.tp, op="max", layer="padding")
        return bool(worst.item() <= self._tolerance)

    def for_decoding(self) -> Self:
        """In evaluation mode. What is given is compared by who generates, not in every pass."""
        self._module.eval()
        self._module.check_inputs = False  # type: ignore[assignment]
        return self

    def make_cache(self, batch: int, capacity: int) -> Continuation:
        """The beginning of texts of up to so many tokens."""
        return Continuation(capacity)

    def last_logits(
        self, input_ids: Tensor, *, attention_mask: Tensor | None, cache: Continuation
    ) -> Tensor:
        """Local logits ``[batch, vocab_local]`` of the last position."""
        with self._local_head():
            logits = cache.step(self._module, input_ids, attention_mask)
        if self._head is None:
            start, stop = self._range(logits.shape[-1])
            logits = logits[..., start:stop]
        return logits

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Reduction = "mean",
        dropout_key: int | None = None,
    ) -> Tensor:
        """The next-token loss from the model's logits, without what its own code may add to it.

        ``dropout_key`` seeds torch's generators.

        Raises:
            ValueError: labels that do not belong to the ids, or sequences of one token.
        """
        check_labels(input_ids, labels)
        check_next_token(labels)
        if dropout_key is not None:
            torch.manual_seed(dropout_key)
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        with self._local_head():
            logits = self._module(
                input_ids=input_ids, return_dict=True, **self._without_cache, **options
            ).logits
        tp, partition = ParallelGroup.single(), Partition.even(logits.shape[-1], 1)
        if self._head is not None:
            tp, partition = self.tp, self.vocabulary
        nothing = labels.new_full((labels.shape[0], 1), ignore_index)
        losses = vocab_parallel_cross_entropy(
            logits,
            torch.cat([labels[:, 1:], nothing], dim=1),
            tp,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            partition=partition,
        )
        return losses[:, :-1] if reduction == "none" else losses

    def shards(self) -> dict[str, tuple[nn.Parameter, ShardSpec]]:
        """Every parameter with how it is divided, by its first name."""
        return {
            name: (p, self._specs.get(name) or ShardSpec.replicated(*p.shape))
            for name, p in self._module.named_parameters()
        }

    def weight_bytes_per_rank(self) -> list[int]:
        """Bytes of parameters that each rank holds; nothing is sent."""
        held = [(p.element_size(), spec) for p, spec in self.shards().values()]
        return [
            sum(size * math.prod(spec.local_shape(rank)) for size, spec in held)
            for rank in range(self.tp.size)
        ]

    def predicted_calls(self, batch: int, sequence: int) -> PredictedCalls:
        """What ``loss(...).backward()`` sends on this rank, from the record of the split.

        Communicates: what a few small forward passes send; every rank must call it.
        """
        return predict(self._module, self.tp, self._small_loss, batch, sequence)

    def _small_loss(self, batch: int, sequence: int, seed: int) -> list[Call]:
        """Runs the loss of a small batch; returns what the loss itself sends."""
        shape = batch, sequence
        vocabulary = self._description.vocab_size
        ids = plain_tokens(vocabulary, batch * sequence, self.device, seed=seed).view(shape)
        loss = self.loss(ids, ids)
        if self._head is None:
            return []
        size = self.tp.size * LOSS_STATISTICS * batch * sequence * loss.element_size()
        dtype = str(loss.dtype).removeprefix("torch.")
        return [Call("all_gather", "forward", "loss", size, dtype, self.tp.name)]

    @functools.cached_property
    def _without_cache(self) -> dict[str, bool]:
        takes = "use_cache" in inspect.signature(self._module.forward).parameters
        return {"use_cache": False} if takes else {}

    @property
    def _tolerance(self) -> float:
        dtype = next(self._module.parameters()).dtype
        return _TOLERANCES.get(dtype, _TOLERANCE_OF_16_BITS)

    def _range(self, vocabulary: int) -> tuple[int, int]:
        return Partition.even(vocabulary, self.tp.size).bounds[self.tp.rank]

    def _first_logits(self, *, local: bool) -> Tensor:
        with torch.no_grad(), evaluating(self._module):
            ids = plain_tokens(self._description.vocab_size, 3, self.device).view(1, -1)
            if local:
                return self.last_logits(ids, attention_mask=None, cache=Continuation(4))
            return Continuation(4).step(self._module, ids, None)

    def _hands_on(self) -> bool:
        """Whether the model's logits from a part of its head's are that part of its logits."""
        assert self._head is not None
        whole, part = self._first_logits(local=False), self._first_logits(local=True)
        partition = self._head.colrow.partition
        fits = whole.shape[-1] == partition.length and part.shape[-1] == partition.size(
            self.tp.rank
        )
        if fits:
            start, stop = partition.bounds[self.tp.rank]
            limit = self._tolerance * float(whole.abs().max())
            fits = torch.allclose(part, whole[..., start:stop], rtol=0, atol=limit)
        failed = torch.tensor([float(not fits)], device=self.device)
        return not primitives.all_reduce(failed, self.tp, op="max", layer="head").item()

    def _open_head(self, head: nn.Module, args: Any) -> None:
        """A forward pre-hook of the head: leaves its result divided while that is asked for."""
        if self._local:
            head.colrow.local = True  # type: ignore[union-attr]

    def _close_head(self, head: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the head: the model shall not take the logits for a loss's."""
        if self._local:
            head.colrow.local = False  # type: ignore[union-attr]

    @contextmanager
    def _local_head(self) -> Iterator[None]:
        self._local = self._head is not None
        try:
            yield
        finally:
            self._local = False


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
