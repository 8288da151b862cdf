"""What the ranks give a split model, compared before a wrong result can follow.

Every rank computes its part of the same batch. Other arguments, another mode or another state of
the random numbers on one of them would give every rank a plausible, wrong result.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow import rng
from colrow.comm import primitives
from colrow.comm.agreement import different_seeds, require_same
from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.digest import Known, combined, digest_of
from colrow.inplace.apply.layers import EmbeddingMixin, GatheredMixin, HeadMixin
from colrow.inplace.apply.parameters import refuse_earlier_ddp
from colrow.inplace.apply.record import record_of
from colrow.inplace.observe.calls import argument_names
from colrow.inplace.observe.modes import drops_out
from colrow.shards.steps import PARTED, steps_of

# Arguments that hold what the model made earlier: each rank has the part of its own heads in them.
_STATES = {
    *("past_key_values", "past_key_value", "past", "layer_past", "cache", "cache_params"),
    *("encoder_outputs", "mems", "memory", "state", "states"),
}

_SETTINGS = ("use_cache", "output_hidden_states", "output_attentions", "return_dict")
_MASKED = ("mask_time_prob", "mask_feature_prob")  # transformers draws these masks with NumPy
_RANDOM = "random numbers"


def compare_inputs(model: nn.Module, *, enabled: bool) -> None:
    """From now on the ranks compare the arguments of every call of the model, and of its parts.

    Sends one all-reduce of 32 bytes in every forward pass, unless ``model.check_inputs`` is False.
    What the ranks' optimisers did since the last one is compared with it.
    Parts that are called by the model itself are not compared again, nor is what is computed again
    in backward.
    """
    model.check_inputs = enabled  # type: ignore[assignment]
    if (record := record_of(model)) is None:
        return
    comparison = _Comparison(model, record.tp)
    split = {name.rpartition(".")[0] for name in record.specs}
    above = {
        "",
        *(inner[:end] for inner in split for end in range(len(inner)) if inner[end] == "."),
    }
    whole_inputs = (EmbeddingMixin, HeadMixin, GatheredMixin)
    for name, module in model.named_modules():
        if name in above or (name in split and isinstance(module, whole_inputs)):
            module.register_forward_pre_hook(comparison.enter, prepend=True, with_kwargs=True)
            module.register_forward_hook(comparison.leave, always_call=True)


class _Comparison:
    """The hooks of one model."""

    def __init__(self, model: nn.Module, tp: ParallelGroup) -> None:
        self.tp = tp
        self._model = weakref.ref(model)
        self._places = [vars(module) for module in model.modules()]
        self._inside: nn.Module | None = None
        self._wrapped: weakref.WeakSet[nn.parallel.DistributedDataParallel] = weakref.WeakSet()
        self._returned: Known = weakref.WeakValueDictionary()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares a call that no other hooked call is around.

        Raises:
            ValueError: the ranks were given different arguments, or run in different modes.
        """
        model: Any = self._model()
        if torch.compiler.is_compiling() or (self._inside is not None and module is not model):
            return
        if torch._C._current_graph_task_id() != -1:
            return  # checkpointing computes again in backward what was compared before
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # what a captured graph is given later is not seen here
        self._inside = module
        refuse_earlier_ddp(self._wrapped)
        if model.check_inputs:
            self._compare(module, self._topics(model, module, args, kwargs))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Remembers what the outermost call gave: it may be an argument of the next one."""
        if torch.compiler.is_compiling() or self._inside is not module:
            return
        self._inside = None
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._returned[id(leaf)] = leaf

    def _topics(
        self, model: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, int | Tensor]:
        """A hash of everything that must be the same on all ranks, by what it is."""
        names = argument_names(module)
        given = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
        given = {k: v for k, v in sorted((given | kwargs).items()) if v is not None}
        found = {
            name: digest_of(None if name in _STATES else value, self._returned)
            for name, value in given.items()
        }
        found["mode (train or eval, gradients, autocast)"] = digest_of(self._modes(), {})
        config = getattr(model, "config", None)
        if config is not None:
            settings = [getattr(config, name, None) for name in _SETTINGS]
            found["settings in config"] = digest_of(settings, {})
        if model.training and (drawn := self._random_states()):
            found[_RANDOM] = digest_of(drawn, {})
        return found

    def _modes(self) -> list[object]:
        training = bytes(place.get("training") is True for place in self._places)
        again = bytes(place.get("gradient_checkpointing") is True for place in self._places)
        autocast = [
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in ("cpu", "cuda")
        ]
        return [training, again, torch.is_grad_enabled(), autocast]

    @property
    def _device(self) -> torch.device:
        """Where the model is; it may be moved, or get its values, after the split."""
        parameters = self._model().parameters()  # type: ignore[union-attr]
        return next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))

    @functools.cached_property
    def _draws(self) -> tuple[bool, bool]:
        """Whether training draws random numbers of torch, and of NumPy."""
        model: Any = self._model()
        config = getattr(model, "config", None)
        masks = getattr(config, "apply_spec_augment", False) and any(
            getattr(config, name, 0) for name in _MASKED
        )
        return drops_out(model, {}), masks

    def _random_states(self) -> list[object]:
        states: list[object] = []
        drops, masks = self._draws
        if drops:
            states.append(torch.get_rng_state())
            if self._device.type == "cuda":
                states.append(torch.cuda.get_rng_state(self._device))
        if masks:
            states.append(np.random.get_state())
        return states

    def _compare(self, module: nn.Module, topics: dict[str, int | Tensor]) -> None:
        steps, name, device = steps_of(self.tp), type(module).__name__, self._device
        total = combined([rng.stream_key(0, *topics), *topics.values(), steps.digest])
        # Ranks of which one records no gradients must send as much as the others.
        norm = steps.take(device) if torch.is_grad_enabled() else torch.zeros((), device=device)
        try:
            require_same(
                total,
                self.tp,
                self._message(name),
                layer="inputs",
                device=device,
                near=norm.double(),
            )
        except ValueError:  # on all ranks
            different = self._different(topics)
            if not different:
                raise ValueError(PARTED) from None
            seeds = ""
            if different == [_RANDOM]:
                seeds = different_seeds("dropout masks", self.tp)
            raise ValueError(seeds or self._message(name, different)) from None

    def _message(self, name: str, different: Sequence[str] = ()) -> str:
        tp = self.tp
        found = f" ({', '.join(different)})" if different else ""
        return (
            f"the {tp.size} ranks of this {tp.name} group were given different batches, or run "
            f"{name} in different ways{found}: give every rank of a group the same, and different "
            "batches only to different dp ranks; check_inputs=False turns this comparison off"
        )

    def _different(self, topics: dict[str, int | Tensor]) -> list[str]:
        """What differs, the same on all ranks. Sends up to 16 bytes for each argument."""
        names = rng.stream_key(0, *topics)
        for numbers in ([names], [int(number) for number in topics.values()]):
            mine = torch.tensor([numbers, [-n for n in numbers]], device=self._device)
            top, low = primitives.all_reduce(mine, self.tp, op="max", layer="inputs").tolist()
            where = [place for place, (a, b) in enumerate(zip(top, low, strict=True)) if a != -b]
            if where:
                return ["which are given"] if numbers == [names] else [[*topics][i] for i in where]
        return []
