"""What PEFT's LoRA layers become when they are split; see :mod:`colrow.inplace.adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import collectives, primitives
from colrow.comm.group import ParallelGroup
from colrow.inplace.atoms import indices_of
from colrow.inplace.equal_weights import check_equal_weights
from colrow.inplace.modules import ColumnMixin, Entry, RowMixin
from colrow.inplace.record import Record
from colrow.inplace.simulate import take
from colrow.inplace.streams import Stream
from colrow.inplace.whole_results import Vocabulary
from colrow.layers.embedding import check_range
from colrow.layers.shared import sum_rows
from colrow.partition import ShardSpec

# Initial values that are made without the weight of the wrapped layer.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
_DROPPED = " dropped"


class When:
    """A hook of an adapter's dropout: whose random numbers its masks are made of.

    Args:
        inside: a rank's own from here on; else those that all ranks draw alike.
    """

    def __init__(self, stream: Stream, *, inside: bool) -> None:
        self.stream, self.inside = stream, inside

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], *_: Any) -> None:
        """Changes the generator in training."""
        if module.training:
            (self.stream.part if self.inside else self.stream.join)(args[0])


class LoadCut:
    """A hook of ``load_state_dict``: of a whole tensor this rank's part is loaded."""

    def __init__(self, name: str, spec: ShardSpec, rank: int) -> None:
        self.name, self.spec, self.rank = name, spec, rank

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Replaces the tensor of this parameter in ``state``."""
        key, spec = prefix + self.name, self.spec
        if key in state and tuple(state[key].shape) == spec.shape:
            assert spec.dim is not None
            state[key] = take(state[key], spec.dim, indices_of(spec, self.rank))


def refuse_mixed(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A forward pre-hook: PEFT takes the adapters of a mixed batch in an order of each process.

    Raises:
        ValueError: for an adapter for each row.
    """
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "adapter_names: a model that is split takes one choice of adapters for a batch: call "
            "set_adapter, and run the rows of each adapter as a batch"
        )


@dataclass
class Adapted:
    """How a LoRA layer is split.

    Attributes:
        record: of the model.
        name: of the LoRA layer in it.
        spec: how the weight of the layer that it wraps is divided.
        entry: where its input comes from when no other layer has that entry.
    """

    record: Record
    name: str
    spec: ShardSpec
    entry: Entry | None = None


class AdaptedMixin(nn.Module):
    """A LoRA layer around a layer that is split."""

    colrow_adapted: Adapted

    def inner(self, x: Tensor) -> dict[str, Tensor]:
        """``A x`` of every adapter in use by its name, and what DoRA needs of ``x`` as well."""
        own: Any = self
        found: dict[str, Tensor] = {}
        if own.disable_adapters or own.merged:
            return found
        for name in own.active_adapters:
            if name in own.lora_A:
                down, drop = own.lora_A[name], own.lora_dropout[name]
                dropped = drop(own._cast_input_dtype(x, down.weight.dtype))
                found[name] = F.linear(dropped, down.weight)
                if name in own.lora_variant and self.training and not isinstance(drop, nn.Identity):
                    found[name + _DROPPED] = dropped
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's result with its adapters'. Sends what the layer sends, a little wider."""
        refuse_mixed(self, (x, *args), kwargs)
        own: Any = self
        base = own.base_layer
        if args or kwargs or own.disable_adapters or own.merged:
            return super().forward(x, *args, **kwargs)
        return self._row(base, x) if isinstance(base, RowMixin) else self._column(base, x)

    def _column(self, base: Any, x: Tensor) -> Tensor:
        how, own = base.colrow, self.colrow_adapted
        entry, others = own.entry, (self,)
        if isinstance(base, ColumnMixin):
            entry, others = how.entry, how.others
        inner: dict[str, Tensor] = {}
        if entry is None or not torch.is_grad_enabled():
            inner = self.inner(x)
        else:
            x, of_all = entry.enter(x, base, others)
            inner = of_all[id(self)]
        if isinstance(base, ColumnMixin):
            y: Tensor = base(x)
            return self._added(base, y, inner)
        y = self._added(base, F.linear(x, _weight(base), base.bias), inner)
        if isinstance(how, Vocabulary) and how.local:
            return y
        return collectives.gather_from_tp(y, how.tp, partition=how.partition, layer=how.layer)

    def _row(self, base: RowMixin, x: Tensor) -> Tensor:
        how = base.colrow
        if how.pair is not None:
            how.pair.row()
        if how.stream is not None:
            how.stream.join(x)
        weight = _weight(base)
        inner = {
            name: F.linear(part, weight) if name.endswith(_DROPPED) else part
            for name, part in self.inner(x).items()
        }
        parts = [F.linear(x, weight), *inner.values()]
        if len({part.dtype for part in parts}) > 1:
            sums = [collectives.reduce_from_tp(part, how.tp, layer=how.layer) for part in parts]
        else:
            joined = collectives.reduce_from_tp(torch.cat(parts, -1), how.tp, layer=how.layer)
            sums = list(joined.split([part.shape[-1] for part in parts], -1))
        y = sums[0] if base.bias is None else sums[0] + base.bias.to(sums[0].dtype)
        return self._added(base, y, dict(zip(inner, sums[1:], strict=True)))

    def _added(self, base: Any, y: Tensor, inner: dict[str, Tensor]) -> Tensor:
        """``y`` of the wrapped layer, and what the adapters add to it."""
        own: Any = self
        dtype = y.dtype
        for name, part in inner.items():
            if name.endswith(_DROPPED):
                continue
            up, scaling = own.lora_B[name], own.scaling[name]
            weight, bias = _of_all_ranks(up, up.weight), _of_all_ranks(up, up.bias)
            assert weight is not None
            more = F.linear(part, weight, bias) * scaling
            if name in own.lora_variant:
                more = self._dora(base, name, y, more, inner.get(name + _DROPPED))
            y = y + more
        return y.to(dtype)

    def _dora(
        self, base: Any, name: str, y: Tensor, more: Tensor, dropped: Tensor | None
    ) -> Tensor:
        """What DoRA adds: the adapter and the layer itself, each output feature scaled."""
        own: Any = self
        magnitude = own.lora_magnitude_vector[name]
        down, up = own.lora_A[name].weight, own.lora_B[name].weight
        with torch.no_grad():
            norm = magnitude.get_weight_norm(base.weight.to(y.dtype), up @ down, own.scaling[name])
        length = _of_all_ranks(own.lora_B[name], magnitude.weight)
        assert length is not None
        scale = (length / norm).view(1, -1)
        if dropped is None:
            plain = y if base.bias is None else y - base.bias
        else:
            plain = dropped if isinstance(base, RowMixin) else F.linear(dropped, _weight(base))
        added: Tensor = (scale - 1) * plain + scale * more
        return added

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter, and splits it as those that were there before the model was split.

        Raises:
            ValueError: its initial values need whole weights, it is a variant of LoRA, or the ranks
                gave it different ones.
        """
        from colrow.inplace.adapters import split_adapter
        from colrow.inplace.apply import Applier

        how = self.colrow_adapted
        record, name = how.record, how.name
        config: Any = kwargs.get("config")
        start = getattr(config, "init_lora_weights", True)
        variant = getattr(self, "resolve_lora_variant", None)
        if start not in _PLAIN_STARTS or (variant is not None and variant(config=config)):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be added to {name}, which is split: it starts "
                "from whole weights; add it before colrow.parallelize"
            )
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        made = {n: p for n, p in self.named_parameters() if adapter_name in n.split(".")}
        check_equal_weights(
            nn.ParameterDict({n.replace(".", "/"): p for n, p in made.items()}), record.tp
        )
        split_adapter(Applier(self, record, name), name, self, how.spec, adapter_name)
        record.settle()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        record, name = self.colrow_adapted.record, self.colrow_adapted.name
        for full in [n for n in record.specs if n.startswith(f"{name}.lora_")]:
            if adapter_name in full.split("."):
                del record.specs[full]


def _weight(base: Any) -> Tensor:
    """``[out, in]``, of what this rank holds."""
    weight: Tensor = base.weight
    return weight.t() if getattr(base.colrow, "transposed", False) else weight


def _of_all_ranks(up: nn.Module, parameter: Tensor | None) -> Tensor | None:
    """A parameter divided as ``B`` is, with the gradient of features that several ranks hold."""
    if parameter is None or not isinstance(up, ColumnMixin):
        return parameter
    how = up.colrow
    return sum_rows(parameter, how.tp, how.shared, 0, how.layer)


class DoraRowMixin(nn.Module):
    """DoRA's magnitudes for a layer of which this rank has some input features."""

    colrow: ParallelGroup

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """The norm of each output feature's weights, over all ranks. Sends an all-reduce."""
        local: Tensor = super().get_weight_norm(*args, **kwargs)  # type: ignore[misc]
        squares = primitives.all_reduce(local.square(), self.colrow, layer="dora")
        return squares.sqrt()


class AdaptedEmbeddingMixin(AdaptedMixin):
    """A LoRA layer around an embedding that is divided over the vocabulary."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's result with its adapters'."""
        refuse_mixed(self, (x, *args), kwargs)
        return super(AdaptedMixin, self).forward(x, *args, **kwargs)

    def _embed(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        """Token ids to vectors of the adapter's rank. Forward: all-reduce."""
        base: Any = getattr(self, "base_layer")  # noqa: B009
        how = base.colrow
        check_range(input, how.partition.length, "token id")
        start, stop = how.partition.bounds[how.tp.rank]
        elsewhere = (input < start) | (input >= stop)
        found = F.embedding((input - start).masked_fill(elsewhere, 0), weight, how.padding)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0)
        return collectives.reduce_from_tp(found, how.tp, layer=how.layer)
