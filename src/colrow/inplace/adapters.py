"""LoRA layers of PEFT: the model is analysed without them, then they are split with their layers.

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

Each piece gives the right values and gradients by itself, so that every way of PEFT's own forward
through them does: adapters off, several at once. In the common way
the pieces of a layer send together with the layer itself (:mod:`colrow.inplace.adapted`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from colrow.inplace.adapted import (
    Adapted,
    AdaptedEmbeddingMixin,
    AdaptedMixin,
    DoraRowMixin,
    LoadCut,
    When,
    refuse_mixed,
)
from colrow.inplace.apply import Applier
from colrow.inplace.atoms import indices_of
from colrow.inplace.calls import ModuleCall
from colrow.inplace.modules import (
    Column,
    ColumnMixin,
    Entry,
    OutputCut,
    Row,
    RowMixin,
)
from colrow.inplace.search import Rows
from colrow.inplace.streams import Stream
from colrow.inplace.unit import linear_kind
from colrow.inplace.whole_results import (
    EmbeddingMixin,
    Gathered,
    GatheredMixin,
    HeadMixin,
    Vocabulary,
)
from colrow.layers.shared import SharedRows
from colrow.partition import ShardSpec


def is_known(module: nn.Module) -> bool:
    """Whether it is a LoRA layer, or one of DoRA, around a layer that multiplies features."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module) not in (layers.Linear, layers.Embedding):
        return False
    adapted: Any = module
    kind = linear_kind(adapted.base_layer)
    table = type(module) is layers.Embedding
    variants = {type(variant).__name__ for variant in adapted.lora_variant.values()}
    known = variants <= (set() if table else {"DoraLinearVariant"})
    return known and kind is not None and (kind == "embedding") == table


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The LoRA layers that are known, by name."""
    return {name: module for name, module in model.named_modules() if is_known(module)}


@contextmanager
def without_adapters(*models: nn.Module) -> Iterator[bool]:
    """The models as they were before LoRA, for a while: each wrapped layer in its wrapper's place.

    Gives whether there was anything to take out.
    """
    places = [
        (parent, name, module)
        for model in models
        for parent in model.modules()
        for name, module in parent._modules.items()
        if module is not None and is_known(module)
    ]
    for parent, name, module in places:
        parent._modules[name] = module.base_layer  # type: ignore[assignment]
    try:
        yield bool(places)
    finally:
        for parent, name, module in places:
            parent._modules[name] = module


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
        entry = Entry(applier.tp, name) if whole else None
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


def split_adapter(
    applier: Applier, name: str, module: nn.Module, spec: ShardSpec, adapter: str
) -> None:
    """Splits one adapter of a LoRA layer.

    Args:
        name: of the LoRA layer.
        spec: how the weight of the layer that it wraps is divided.
    """
    adapted: Any = module
    base, tp = adapted.base_layer, applier.tp
    rows = [indices_of(spec, rank) for rank in range(tp.size)]
    if isinstance(base, EmbeddingMixin):
        _cut(applier, adapted.lora_embedding_A, adapter, 1, rows)
        return
    down, up = adapted.lora_A[adapter], adapted.lora_B[adapter]
    drop = adapted.lora_dropout[adapter]
    path_down, path_up = f"{name}.lora_A.{adapter}", f"{name}.lora_B.{adapter}"
    if isinstance(base, RowMixin):
        _cut(applier, down, "weight", 1, rows)
        applier.attach(down, "colrow", Row(tp, path_down, transposed=False))
        applier.change_class(down, RowMixin)
        if (magnitude := _magnitude(module, adapter)) is not None:
            applier.attach(magnitude, "colrow", tp)
            applier.change_class(magnitude, DoraRowMixin)
        applier.hook(drop.register_forward_pre_hook(When(stream := Stream(tp), inside=True)))
        applier.hook(drop.register_forward_hook(When(stream, inside=False)))
        return
    _cut(applier, up, "weight", 0, rows)
    if up.bias is not None:
        _cut(applier, up, "bias", 0, rows)
    if (magnitude := _magnitude(module, adapter)) is not None:
        _cut(applier, magnitude, "weight", 0, rows)
    how = base.colrow
    if isinstance(base, ColumnMixin):
        if how.entry is None:  # the gradient of its input is summed further up
            applier.share(down, "weight", f"{path_down}.weight", once=False)
        else:
            entry = Entry(tp, path_down)
            applier.hook(down.register_forward_hook(OutputCut(entry)))
        local = applier.spec_of(up.weight)
        assert local is not None
        shared = SharedRows.of(local, tp.rank)
        mine = Column(tp, path_up, False, shared, entry=None, alone=False)
        applier.attach(up, "colrow", mine)
        applier.change_class(up, ColumnMixin)
        if how.stream is not None:
            applier.hook(drop.register_forward_pre_hook(When(how.stream, inside=False)))
            applier.hook(drop.register_forward_hook(When(how.stream, inside=True)))
    elif isinstance(base, HeadMixin):
        assert isinstance(how, Vocabulary)
        applier.attach(up, "colrow", how)  # the same: it says whether logits are gathered
        applier.change_class(up, HeadMixin)
    else:
        applier.attach(up, "colrow", Gathered(tp, path_up, False, how.partition))
        applier.change_class(up, GatheredMixin)


def _magnitude(adapted: Any, adapter: str) -> nn.Module | None:
    vectors = adapted.lora_magnitude_vector
    return vectors[adapter] if vectors and adapter in vectors else None


def _cut(applier: Applier, owner: nn.Module, name: str, dim: int, rows: Rows) -> None:
    """Splits a parameter of an adapter, and cuts what is loaded into it whole."""
    applier.split(owner, name, dim, rows)
    spec = applier.spec_of(owner._parameters[name])
    assert spec is not None
    applier.hook(owner.register_load_state_dict_pre_hook(LoadCut(name, spec, applier.tp.rank)))
