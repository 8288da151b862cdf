"""Methods of transformers' models that read whole weights, which no rank has any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from colrow.inplace.apply import Applier
from colrow.inplace.record import Record

_INSTEAD = {
    "resize_token_embeddings": "resize the model before it is parallelised",
    "save_pretrained": "call colrow.save_pretrained(model, directory) on all ranks",
}


class _WholeOnly:
    """Such a method, refused unless the whole weights are given to it.

    Args:
        own: the method of the model.
        name: of the method.
        record: of the model that is split, whose weights may be given; None for a part of it.
    """

    def __init__(self, own: Callable[..., Any], name: str, record: Record | None) -> None:
        self._own, self._name, self._record = own, name, record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result.

        Raises:
            ValueError: without whole weights, as ``state_dict``.
        """
        given = kwargs.get("state_dict")
        if self._record is None or given is None or not self._is_whole(given, self._record):
            raise ValueError(
                f"{self._name}: this model is split, and a rank has parts of its weights only; "
                f"{_INSTEAD[self._name]}"
            )
        return self._own(*args, **kwargs)

    @staticmethod
    def _is_whole(given: Any, record: Record) -> bool:
        return all(
            tuple(given[name].shape) == spec.shape
            for name, spec in record.specs.items()
            if name in given
        )


def refuse_what_needs_whole_weights(applier: Applier) -> None:
    """For the model and its parts."""
    for module in applier.model.modules():
        for name in _INSTEAD:
            own = getattr(module, name, None)
            if callable(own) and not isinstance(own, nn.Module):
                record = applier.record if module is applier.model else None
                applier.attach(module, name, _WholeOnly(own, name, record))
