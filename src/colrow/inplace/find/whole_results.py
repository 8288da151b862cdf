"""Layers that are split alone, with whole results: embedding, head, and large ones in no pair.

Embedding and head are divided over the vocabulary. Of another layer the output features are divided
and its result is gathered; of a parameter that its module uses directly, the parameter itself. That
needs no proof beyond the layer's own formula: its input, its result and the gradient are the same
on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from colrow.inplace.find.infer import Inference
from colrow.inplace.observe.calls import ModuleCall, full_name
from colrow.inplace.observe.linear_layers import (
    inside_adapter_layers,
    linear_kind,
    output_dim,
    plain_table,
)

# Below this part of a model, spreading a layer is not worth a collective.
_SMALLEST = 1e-3
_LOSSES = ("ForCausalLMLoss", "ForMaskedLMLoss")


@dataclass
class GatheredLayers:
    """Large layers and parameters in no pair, by name; of parameters, the dimension to divide."""

    linears: dict[str, nn.Module]
    tables: dict[str, nn.Embedding]
    parameters: dict[str, int]

    def only(self, allowed: Callable[[str], bool]) -> GatheredLayers:
        """Those that may be split."""
        return GatheredLayers(
            {n: m for n, m in self.linears.items() if allowed(n)},
            {n: m for n, m in self.tables.items() if allowed(n)},
            {n: dim for n, dim in self.parameters.items() if allowed(n.rpartition(".")[0])},
        )


def gathered_layers(
    model: nn.Module,
    calls: Mapping[str, ModuleCall],
    inference: Inference,
    reserved: set[str],
    ranks: int,
) -> GatheredLayers:
    """The large layers and parameters that were called and are in no pair.

    Args:
        inference: gets reasons for layers inside adapters.
        reserved: layers of the vocabulary, which are split otherwise.
    """
    taken: set[int] = {id(p) for n in reserved for p in model.get_submodule(n).parameters()}
    shared: set[int] = set()
    for name, proofs in inference.proofs.items():
        module = model.get_submodule(name)
        for proof in proofs:
            group = proof.group
            for layer in (*group.columns, *group.rows):
                taken |= {id(p) for p in module.get_submodule(layer).parameters()}
            taken |= {id(module.get_parameter(n)) for n in group.parameters}
            shared |= {id(module.get_parameter(n)) for n in proof.shared}
    total = sum(p.numel() for p in model.parameters())
    found = GatheredLayers({}, {}, {})
    wrapped = inside_adapter_layers(model)  # they may read weights, or merge into them
    for name, kind_of_adapter in wrapped.items():
        inference.reasons.setdefault(
            name, f"inside an adapter of a kind ({kind_of_adapter}) that is not split"
        )
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        kind = linear_kind(module)
        if name in wrapped:
            continue
        if kind is None or name not in calls:
            if not {name, name.rpartition(".")[0]} & calls.keys():
                continue
            for last, parameter in module._parameters.items():
                if parameter is None:
                    continue
                free = id(parameter) not in taken and holders[id(parameter)] == 1
                if (
                    free
                    and parameter.numel() >= _SMALLEST * total
                    and _worth(module, parameter, ranks)
                ):
                    found.parameters[full_name(name, last)] = _dim(parameter, ranks)
            continue
        if any(id(p) in taken | shared or holders[id(p)] > 1 for p in own):
            continue
        if own[0].numel() < _SMALLEST * total:
            continue
        if isinstance(module, nn.Embedding):
            plain = kind == "embedding" and plain_table(module)
            if plain and module.num_embeddings >= ranks and _tokens(calls[name]):
                found.tables[name] = module
            continue
        # A router's few scores are not worth a collective.
        if own[0].shape[output_dim(kind)] >= 4 * ranks:
            found.linears[name] = module
    return found


def _worth(module: nn.Module, parameter: nn.Parameter, ranks: int) -> bool:
    """Whether it is a matrix or a stack of them: no filter, table of places, or few scores."""
    if isinstance(module, nn.Embedding | _ConvNd) or parameter.dim() < 2 or 1 in parameter.shape:
        return False
    return parameter.dim() > 2 or min(parameter.shape) >= 4 * ranks


def _dim(parameter: nn.Parameter, ranks: int) -> int:
    """The first dimension that divides well, or the longest."""
    shape = parameter.shape
    wide = [dim for dim in range(len(shape)) if shape[dim] >= 4 * ranks or not shape[dim] % ranks]
    return wide[0] if wide else max(range(len(shape)), key=lambda dim: shape[dim])


def _tokens(call: ModuleCall) -> bool:
    """Whether a table was asked for anything but consecutive positions."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    ids = next((x for x in leaves if isinstance(x, Tensor)), None)
    if ids is None or ids.dim() == 0 or ids.is_floating_point():
        return False
    return not bool((ids.diff(dim=-1) == 1).all()) if ids.shape[-1] > 1 else False


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


def knows_loss(
    model: nn.Module, layers: VocabularyLayers, batch: Mapping[str, Any] | None = None
) -> bool:
    """Whether the model computes a loss that can be computed from each rank's logits.

    Args:
        batch: the forward pass in question, which must have labels then.
    """
    if batch is not None and "input_ids" not in batch:
        return False
    model = without_peft(model)
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if len(layers.heads) != 1 or code is None or "loss_function" not in code.co_names:
        return False
    return getattr(getattr(model, "loss_function", None), "__name__", "") in _LOSSES


def without_peft(model: nn.Module) -> nn.Module:
    """The model that PEFT has put its own around, which hands all arguments on to it."""
    inner = getattr(model, "get_base_model", None)
    return inner() if hasattr(model, "peft_config") and callable(inner) else model


@contextmanager
def with_changed_loss(model: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside it, the model's loss function is what ``change`` makes of it."""
    model = without_peft(model)
    before = model.__dict__.get("_loss_function")
    model.loss_function = change(model.loss_function)
    try:
        yield
    finally:
        put_loss_back(model, before)


def put_loss_back(model: Any, loss: Any) -> None:
    """Gives a model of transformers its loss function again; None for that of its class."""
    if loss is None:
        model.__dict__.pop("_loss_function", None)
    else:
        model.__dict__["_loss_function"] = loss
