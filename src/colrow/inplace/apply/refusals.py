"""What a split model refuses: methods that read whole weights, and results that are divided."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.record import record_of
from colrow.partition import ShardSpec
from colrow.shards.model_shards import ModelShards, shards_for

_INSTEAD = {
    "resize_token_embeddings": "resize the model before it is parallelised",
    "save_pretrained": "call colrow.save_pretrained(model, directory) on all ranks",
    "add_adapter": "add adapters before the model is parallelised",
    "load_adapter": "add adapters before the model is parallelised",
}

_OF_TRANSFORMERS = ("add_adapter", "load_adapter")


def _is_of_transformers(method: Any) -> bool:
    return str(method.__func__.__module__).startswith("transformers.")


class _WholeOnly:
    """Such a method, refused unless the whole weights are given to it.

    Args:
        own: the method of the model.
        name: of the method.
    """

    def __init__(self, own: Callable[..., Any], name: str) -> None:
        self._own, self._name = own, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result.

        Raises:
            ValueError: without whole weights, as ``state_dict``.
        """
        model: nn.Module = self._own.__self__  # type: ignore[attr-defined]
        given, record = kwargs.get("state_dict"), shards_for(model)
        if record is None or given is None or not _is_whole(given, record):
            raise ValueError(
                f"{self._name}: this model is split, and a rank has parts of its weights only; "
                f"{_INSTEAD[self._name]}"
            )
        return self._own(*args, **kwargs)


def _is_whole(given: Any, record: ModelShards) -> bool:
    return all(
        tuple(given[name].shape) == spec.shape
        for name, spec in record.specs.items()
        if name in given
    )


class _Unload:
    """PEFT's methods that take its layers out: the model that is left knows how it is split.

    Args:
        own: the method.
        model: what was split.
    """

    def __init__(self, own: Callable[..., Any], model: nn.Module) -> None:
        self._own, self._model = own, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        model = self._model()
        record = None if model is None else record_of(model)
        known: dict[int, ShardSpec] = {}
        if model is not None and record is not None:
            for name, parameter in model.named_parameters(remove_duplicate=False):
                if name in record.specs:
                    known[id(parameter)] = record.specs[name]
        left = self._own(*args, **kwargs)
        if model is not None and record is not None:
            left.__dict__["colrow_record"] = record.following(known, left)
            if left is not model:
                model.__dict__.pop("colrow_record")
        return left


def refuse_what_needs_whole_weights(applier: Applier) -> None:
    """Replaces such methods of the model and its parts by errors that say what to do instead."""
    whole = applier.model
    for module in whole.modules():
        for name in _INSTEAD:
            own = getattr(module, name, None)
            # A method of this object: PEFT's models hand on those of the model inside.
            if not callable(own) or getattr(own, "__self__", None) is not module:
                continue
            # PEFT's own way to add adapters splits them.
            if name not in _OF_TRANSFORMERS or _is_of_transformers(own):
                applier.attach(module, name, _WholeOnly(own, name))
                if module is not whole:
                    applier.attach(module, "colrow_inside", weakref.ref(whole))
        for name in ("merge_and_unload", "unload"):
            own = getattr(module, name, None)
            if getattr(own, "__self__", None) is module and callable(own):
                applier.attach(module, name, _Unload(own, whole))


def refuse_attention_weights(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A forward pre-hook of the model.

    Raises:
        ValueError: when the caller asks for attention weights, of which a rank has some heads'.
    """
    if _asks_for("output_attentions", module, kwargs):
        raise ValueError(
            "output_attentions: each rank computes the attention weights of its own heads only; "
            "take them from the model before it is parallelised"
        )


def refuse_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a model whose blocks divide tokens.

    Raises:
        ValueError: when the caller asks for what the blocks give.
    """
    if _asks_for("output_hidden_states", module, kwargs):
        raise ValueError(
            "output_hidden_states: with sequence_parallel each rank has the hidden states of its "
            "own tokens only; split the model without it"
        )


def refuse_mixed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: PEFT takes the adapters of a mixed batch in an order of each process.

    Raises:
        ValueError: for an adapter for each row.
    """
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "adapter_names: a model that is split takes one choice of adapters for a batch: call "
            "set_adapter, and run the rows of each adapter as a batch"
        )


def _asks_for(option: str, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get(option)
    return bool(getattr(getattr(module, "config", None), option, False) if asked is None else asked)
