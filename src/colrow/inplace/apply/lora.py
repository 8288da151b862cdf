"""LoRA layers of PEFT: split, with the layers that they wrap, after the model without them is.

A LoRA layer adds ``B (A x)``, of a small rank, to what the layer that it wraps gives for ``x``:

==================  ====================================  ====================================
the wrapped layer   A                                     B
==================  ====================================  ====================================
column-parallel     whole; gradient of its result summed  the layer's output features
row-parallel        the layer's input features; summed    whole
gathered            whole                                 the layer's output features; gathered
head                whole                                 the layer's range of the vocabulary
embedding           the layer's range of the vocabulary   whole
==================  ====================================  ====================================

Each matrix gives the right values and gradients by itself, so that every way of PEFT's own forward
through them does: adapters off, several at once. In the common way what the matrices of a layer
send goes together with what the layer itself sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import collectives
from colrow.inplace.apply.agreement import check_equal_weights
from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.gradients import ColumnEntry
from colrow.inplace.apply.layers import (
    ColumnMixin,
    EmbeddingMixin,
    GatheredMixin,
    HeadMixin,
    RowMixin,
    VocabularySplit,
    vectors,
)
from colrow.inplace.apply.lora_matrices import split_adapter
from colrow.inplace.apply.record import SplitRecord
from colrow.inplace.apply.refusals import refuse_mixed
from colrow.inplace.observe.calls import ModuleCall
from colrow.layers.shared import sum_rows
from colrow.partition import ShardSpec

# Initial values that are made without the weight of the wrapped layer.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
_DROPPED = " dropped"


@dataclass
class Adapted:
    """How a LoRA layer is split.

    Attributes:
        record: of the model.
        name: of the LoRA layer in it.
        spec: how the weight of the layer that it wraps is divided.
        entry: where its input comes from when no other layer has that entry.
    """

    record: SplitRecord
    name: str
    spec: ShardSpec
    entry: ColumnEntry | None = None


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
        if isinstance(how, VocabularySplit) and how.local:
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


class AdaptedEmbeddingMixin(AdaptedMixin):
    """A LoRA layer around an embedding that is divided over the vocabulary."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's result with its adapters'."""
        refuse_mixed(self, (x, *args), kwargs)
        return super(AdaptedMixin, self).forward(x, *args, **kwargs)

    def _embed(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        """Token ids to vectors of the adapter's rank. Forward: all-reduce."""
        base: Any = getattr(self, "base_layer")  # noqa: B009
        return vectors(input, weight, base.colrow)


def split_adapters(
    applier: Applier, layers: Mapping[str, nn.Module], calls: Mapping[str, ModuleCall]
) -> None:
    """Splits the adapters of these LoRA layers as the layer is split that each wraps.

    Args:
        calls: what the layers that multiply features were called with, without adapters.
    """
    for name, module in layers.items():
        adapted: Any = module
        base: nn.Module = adapted.base_layer
        weight: Any = base.weight
        spec = applier.spec_of(weight)
        if spec is None:
            continue
        if not isinstance(
            base, ColumnMixin | RowMixin | GatheredMixin | HeadMixin | EmbeddingMixin
        ):
            raise ValueError(
                f"{name} holds some features of every vector on each rank, which LoRA adapters of "
                "an embedding cannot follow: merge the adapters, or leave that layer out of them"
            )
        table = isinstance(base, EmbeddingMixin)
        adapters = adapted.lora_embedding_A if table else adapted.lora_A
        for adapter in list(adapters):
            split_adapter(applier, name, module, spec, adapter)
        whole = isinstance(base, GatheredMixin | HeadMixin)
        entry = ColumnEntry(applier.tp, name) if whole else None
        applier.attach(module, "colrow_adapted", Adapted(applier.record, name, spec, entry))
        applier.change_class(module, AdaptedEmbeddingMixin if table else AdaptedMixin)
    if hasattr(applier.model, "peft_config"):
        applier.hook(applier.model.register_forward_pre_hook(refuse_mixed, with_kwargs=True))
    _send_together(applier, layers, calls)


def _send_together(
    applier: Applier, layers: Mapping[str, nn.Module], calls: Mapping[str, ModuleCall]
) -> None:
    """Lets the adapters of layers that get the same tensor share the all-reduce of these layers."""
    columns: dict[int, dict[str, ColumnMixin]] = {}  # by entry
    for name, module in applier.model.named_modules():
        base = layers[name].base_layer if name in layers else module
        if isinstance(base, ColumnMixin) and base.colrow.entry is not None:
            columns.setdefault(id(base.colrow.entry), {})[name] = base
    for together in columns.values():
        for name in [n for n in together if n in layers]:
            for other, column in together.items():
                if other == name or _same_input(calls, name, other):
                    how, adapted = column.colrow, layers[name]
                    how.others, how.alone = (*how.others, adapted), False  # type: ignore[arg-type]


def _same_input(calls: Mapping[str, ModuleCall], one: str, other: str) -> bool:
    if one not in calls or other not in calls:
        return False
    first, second = calls[one].args[:1], calls[other].args[:1]
    return bool(first and second) and torch.equal(first[0], second[0])
