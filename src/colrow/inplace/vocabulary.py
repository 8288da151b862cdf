"""Embedding, head and loss of a model, divided over the vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.apply import Applier
from colrow.inplace.tuners import inside_adapter_layers
from colrow.inplace.whole_results import EmbeddingMixin, HeadMixin, Vocabulary
from colrow.layers.loss import vocab_parallel_cross_entropy
from colrow.partition import Partition

_LOSSES = ("ForCausalLMLoss", "ForMaskedLMLoss")


@dataclass
class VocabularyLayers:
    """The layers of a model that have one row for each token.

    Attributes:
        embeddings, heads: by name.
        local_loss: whether the model's loss may be computed from each rank's logits.
    """

    embeddings: dict[str, nn.Embedding]
    heads: dict[str, nn.Linear]
    local_loss: bool = True

    @property
    def names(self) -> set[str]:
        """All of them."""
        return {*self.embeddings, *self.heads}

    def only(self, allowed: Callable[[str], bool]) -> VocabularyLayers:
        """Those that may be split; what is tied may be only together."""
        tied = {id(m.weight) for n, m in self._all.items() if not allowed(n)}
        kept = {n for n, m in self._all.items() if id(m.weight) not in tied}
        return VocabularyLayers(
            {n: m for n, m in self.embeddings.items() if n in kept},
            {n: m for n, m in self.heads.items() if n in kept},
            self.local_loss,
        )

    @property
    def _all(self) -> dict[str, nn.Embedding | nn.Linear]:
        return {**self.embeddings, **self.heads}


def vocabulary_layers(model: nn.Module, called: set[str], ranks: int) -> VocabularyLayers:
    """The token embedding and the head, with everything that is tied to them."""
    called = called - inside_adapter_layers(model).keys()
    modules = {n: m for n, m in model.named_modules() if n in called}
    tables = [m for m in modules.values() if isinstance(m, nn.Embedding)]
    embedding = _asked(model, "get_input_embeddings")
    if embedding is None and not hasattr(model, "get_input_embeddings"):
        embedding = max(tables, key=lambda m: m.weight.numel(), default=None)
    head = _asked(model, "get_output_embeddings")
    weights = {id(m.weight) for m in (embedding, head) if isinstance(m, nn.Embedding | nn.Linear)}
    embeddings = {
        n: m
        for n, m in modules.items()
        if isinstance(m, nn.Embedding)
        and id(m.weight) in weights
        and m.num_embeddings >= ranks
        and plain_table(m)
    }
    rows = {m.num_embeddings: m.embedding_dim for m in embeddings.values()}
    heads = {
        n: m
        for n, m in modules.items()
        if isinstance(m, nn.Linear)
        and type(m).forward is nn.Linear.forward
        and m.out_features >= ranks
        and (
            id(m.weight) in weights or (head is None and rows.get(m.out_features) == m.in_features)
        )
    }
    return VocabularyLayers(embeddings, heads)


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def plain_table(module: nn.Embedding) -> bool:
    """Whether it has none of the options that need the whole table."""
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def split_vocabulary(applier: Applier, layers: VocabularyLayers) -> None:
    """Divides these layers over the ranks, each as evenly as possible."""
    tp = applier.tp
    for name, table in layers.embeddings.items():
        split_table(applier, name, table)
    for name, head in layers.heads.items():
        partition = Partition.even(head.out_features, tp.size)
        applier.split(head, "weight", 0, rows_of(partition))
        if head.bias is not None:
            applier.split(head, "bias", 0, rows_of(partition))
        applier.attach(head, "colrow", Vocabulary(tp, name, partition))
        applier.change_class(head, HeadMixin)


def split_table(applier: Applier, name: str, table: nn.Embedding) -> None:
    """Divides an embedding over the ranks, as evenly as possible."""
    tp = applier.tp
    partition = Partition.even(table.num_embeddings, tp.size)
    start, stop = partition.bounds[tp.rank]
    padding = table.padding_idx
    held = padding is not None and start <= padding < stop
    applier.split(table, "weight", 0, rows_of(partition))
    local = padding - start if padding is not None and held else None
    applier.attach(table, "colrow", Vocabulary(tp, name, partition, local))
    own = type(table).forward is not nn.Embedding.forward
    applier.change_class(table, EmbeddingMixin, first=not own)


def rows_of(partition: Partition) -> list[list[int]]:
    """The indices that each rank holds."""
    return [list(range(start, stop)) for start, stop in partition.bounds]


def knows_loss(model: nn.Module, layers: VocabularyLayers) -> bool:
    """Whether the model computes a loss that can be computed from each rank's logits."""
    model = _without_wrapper(model)
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if len(layers.heads) != 1 or code is None or "loss_function" not in code.co_names:
        return False
    return getattr(getattr(model, "loss_function", None), "__name__", "") in _LOSSES


def _without_wrapper(model: nn.Module) -> nn.Module:
    """The model that PEFT has put its own around, which hands all arguments on to it."""
    inner = getattr(model, "get_base_model", None)
    return inner() if hasattr(model, "peft_config") and callable(inner) else model


def split_loss(applier: Applier, layers: VocabularyLayers) -> None:
    """Lets the model compute its loss from each rank's logits, if it is a loss that is known.

    Then, while gradients are recorded, a forward with ``labels`` gathers no logits, and has none
    in its result.
    """
    outer: Any = applier.model
    if not layers.local_loss or not knows_loss(outer, layers):
        return
    model: Any = _without_wrapper(outer)
    loss = model.loss_function
    (head,) = layers.heads.values()
    before = model.__dict__.get("_loss_function")
    how: Any = head.colrow
    model.loss_function = _LocalLoss(how, loss, shifts=loss.__name__ == "ForCausalLMLoss")
    applier.record.undo.append(lambda: _put_back(model, before))
    applier.hook(outer.register_forward_pre_hook(_open, with_kwargs=True))
    applier.hook(outer.register_forward_hook(_close, always_call=True))


@contextmanager
def given_loss(model: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """For a while the model's loss is what ``change`` makes of it."""
    model = _without_wrapper(model)
    before = model.__dict__.get("_loss_function")
    model.loss_function = change(model.loss_function)
    try:
        yield
    finally:
        _put_back(model, before)


def _put_back(model: Any, loss: Any) -> None:
    if loss is None:
        model.__dict__.pop("_loss_function", None)
    else:
        model.__dict__["_loss_function"] = loss


def _open(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    how: Vocabulary = module.loss_function.how
    dictionary = kwargs.get("return_dict")
    if dictionary is None:
        dictionary = getattr(module.config, "return_dict", True)
    labels = kwargs.get("labels")
    how.local = bool(labels is not None and torch.is_grad_enabled() and dictionary)


def _close(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    how: Vocabulary = module.loss_function.how
    was_local, how.local = how.local, False
    if was_local and hasattr(output, "items"):
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})
    return output


class _LocalLoss:
    """The loss of transformers' models, from this rank's logits."""

    def __init__(self, how: Vocabulary, whole: Callable[..., Tensor], *, shifts: bool) -> None:
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
