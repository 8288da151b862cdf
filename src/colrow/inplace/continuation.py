"""A text continued token by token by transformers' model itself, whatever it keeps of the past.

What a model needs to go on (keys and values, states of Mamba layers, positions, masks) differs by
architecture, and its class knows it. ``generate`` of transformers prepares it, and hands it here
instead of to a loop of its own; each step then asks the model for its inputs and tells it what came
out, as that loop does.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from colrow.verification.reference import quiet_transformers


class Continuation:
    """The tokens so far, and the arguments that the model takes to go on.

    Args:
        capacity: tokens that will come at most, the prompt among them, for caches that are
            allocated at once.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tokens: Tensor | None = None
        self._arguments: dict[str, Any] = {}

    @property
    def length(self) -> int:
        """Tokens that the model has seen."""
        return 0 if self._tokens is None else self._tokens.shape[1]

    @property
    def bytes(self) -> int:
        """Memory of the cache's tensors on this rank."""
        return sum(x.numel() * x.element_size() for x in _tensors(self._arguments.get("cache")))

    def step(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The model's logits of the last position, of new tokens; the first call has the prompt.

        Args:
            model: a generative model of transformers.
            input_ids: ``[batch, new]``; one new token each after the first call.
            attention_mask: of the prompt, ``[batch, new]``, 0 at padding on the left. Later calls
                go on with it.

        Raises:
            ValueError: several new tokens after the first call.
        """
        first = self._tokens is None
        if self._tokens is None:
            self._begin(model, input_ids, attention_mask)
            assert self._tokens is not None
        elif input_ids.shape[1] != 1:
            raise ValueError(
                f"{input_ids.shape[1]} new tokens at once: {type(model).__name__} goes on by one"
            )
        else:
            self._tokens = torch.cat([self._tokens, input_ids], dim=1)
        new = 1 if not first and self._arguments.get("use_cache") else None
        with redirect_stdout(sys.stderr):  # where some report what they leave out, at each token
            inputs = model.prepare_inputs_for_generation(
                self._tokens, next_sequence_length=new, is_first_iteration=first, **self._arguments
            )
        outputs = model(**inputs, return_dict=True)
        self._arguments = model._update_model_kwargs_for_generation(
            outputs, self._arguments, is_encoder_decoder=False
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _begin(self, model: Any, prompt: Tensor, attention_mask: Tensor | None) -> None:
        """Lets transformers prepare its arguments, its cache among them."""

        def keep(_: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
            for name in _OF_THE_LOOP:
                prepared.pop(name, None)
            self._tokens, self._arguments = input_ids, prepared
            return input_ids

        options: dict[str, Any] = {}
        if "attention_mask" in inspect.signature(model.forward).parameters:
            mask = torch.ones_like(prompt) if attention_mask is None else attention_mask.long()
            options["attention_mask"] = mask
        with quiet_transformers():
            model.generate(
                prompt,
                custom_generate=keep,
                max_length=max(self.capacity, prompt.shape[1] + 1),
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
                **options,
            )


_OF_THE_LOOP = ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus")


def _tensors(value: Any) -> list[Tensor]:
    """Those in a cache of any class: in its lists, dictionaries and attributes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif type(value).__module__.startswith("transformers."):
        parts = [part for name, part in vars(value).items() if name != "config"]
    else:
        parts = []
    return [tensor for part in parts for tensor in _tensors(part)]
