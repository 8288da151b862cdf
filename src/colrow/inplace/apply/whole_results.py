"""Splits what :mod:`colrow.inplace.find.whole_results` found; the loss may take local logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.layers import (
    EmbeddingMixin,
    GatheredMixin,
    GatheredSplit,
    HeadMixin,
    VocabularySplit,
)
from colrow.inplace.find.shard_groups import indices_by_rank
from colrow.inplace.find.whole_results import (
    GatheredLayers,
    VocabularyLayers,
    knows_loss,
    put_loss_back,
    without_peft,
)
from colrow.inplace.observe.linear_layers import linear_kind, output_dim
from colrow.layers.loss import vocab_parallel_cross_entropy
from colrow.partition import Partition


def split_table(applier: Applier, name: str, table: nn.Embedding) -> None:
    """Divides an embedding over the ranks, as evenly as possible."""
    tp = applier.tp
    partition = Partition.even(table.num_embeddings, tp.size)
    start, stop = partition.bounds[tp.rank]
    padding = table.padding_idx
    held = padding is not None and start <= padding < stop
    applier.split(table, "weight", 0, indices_by_rank(partition))
    local = padding - start if padding is not None and held else None
    applier.attach(table, "colrow", VocabularySplit(tp, name, partition, local))
    own = type(table).forward is not nn.Embedding.forward
    applier.change_class(table, EmbeddingMixin, first=not own)


def split_vocabulary(applier: Applier, layers: VocabularyLayers) -> None:
    """Divides these layers over the vocabulary, each as evenly as possible."""
    for name, table in layers.embeddings.items():
        split_table(applier, name, table)
    for name, head in layers.heads.items():
        partition = Partition.even(head.out_features, applier.tp.size)
        applier.split_outputs(head, 0, indices_by_rank(partition))
        applier.attach(head, "colrow", VocabularySplit(applier.tp, name, partition))
        applier.change_class(head, HeadMixin)


def split_gathered(applier: Applier, layers: GatheredLayers) -> None:
    """Divides these layers and parameters, each as evenly as possible."""
    for name, table in layers.tables.items():
        split_table(applier, name, table)
    for name, module in layers.linears.items():
        kind = linear_kind(module)
        assert kind is not None
        length = module.get_parameter("weight").shape[output_dim(kind)]
        split_linear(applier, name, module, Partition.even(length, applier.tp.size))
    for path, dim in layers.parameters.items():
        owner, _, last = path.rpartition(".")
        applier.gather_when_used(applier.model.get_submodule(owner), last, path, dim)


def split_linear(applier: Applier, name: str, module: nn.Module, partition: Partition) -> None:
    """Divides a layer that multiplies features by its output features; its result is gathered."""
    kind = linear_kind(module)
    assert kind is not None
    applier.split_outputs(module, output_dim(kind), indices_by_rank(partition))
    applier.attach(module, "colrow", GatheredSplit(applier.tp, name, kind == "conv1d", partition))
    applier.change_class(module, GatheredMixin)


def split_loss(applier: Applier, layers: VocabularyLayers) -> None:
    """Lets the model compute its loss from each rank's logits, if it is a loss that is known.

    Then, while gradients are recorded, a forward with ``labels`` gathers no logits, and has none
    in its result.
    """
    outer: Any = applier.model
    if not layers.local_loss or not knows_loss(outer, layers):
        return
    model: Any = without_peft(outer)
    loss = model.loss_function
    (head,) = layers.heads.values()
    before = model.__dict__.get("_loss_function")
    how: Any = head.colrow
    model.loss_function = _LocalLoss(how, loss, shifts=loss.__name__ == "ForCausalLMLoss")
    applier.record.undo.append(lambda: put_loss_back(model, before))
    applier.hook(outer.register_forward_pre_hook(_open, with_kwargs=True))
    applier.hook(outer.register_forward_hook(_close, always_call=True))


def _open(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    how: VocabularySplit = module.loss_function.how
    dictionary = kwargs.get("return_dict")
    if dictionary is None:
        dictionary = getattr(module.config, "return_dict", True)
    labels = kwargs.get("labels")
    how.local = bool(labels is not None and torch.is_grad_enabled() and dictionary)


def _close(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    how: VocabularySplit = module.loss_function.how
    was_local, how.local = how.local, False
    if was_local and hasattr(output, "items"):
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})
    return output


class _LocalLoss:
    """The loss of transformers' models, from this rank's logits."""

    def __init__(self, how: VocabularySplit, whole: Callable[..., Tensor], *, shifts: bool) -> None:
        self.how, self.whole, self.shifts = how, whole, shifts
        self.__name__ = getattr(whole, "__name__", "loss")

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """The mean over the labels that count, or the sum divided by ``num_items_in_batch``."""
        how = self.how
        if not how.local:
            options = {"shift_labels": shift_labels} if self.shifts else {}
            return self.whole(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, **options, **others
            )
        if self.shifts:
            if shift_labels is None:
                padded = nn.functional.pad(labels, (0, 1), value=ignore_index)
                shift_labels = padded[..., 1:]
            labels = shift_labels
        labels = labels.to(logits.device).reshape(-1)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        mean = num_items_in_batch is None
        loss = vocab_parallel_cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels,
            how.tp,
            ignore_index=ignore_index,
            reduction="mean" if mean else "sum",
            partition=how.partition,
            layer=how.layer,
        )
        if mean:
            return loss
        count: Any = num_items_in_batch
        if isinstance(count, Tensor):
            count = count.to(loss.device)
        per_item: Tensor = loss / count
        return per_item
