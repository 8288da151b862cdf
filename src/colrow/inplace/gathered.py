"""Layers outside any pair, split by their output features, with the result gathered.

That spreads their weights, and sends their results. It needs no proof beyond the layer's own
formula, since its input and its result are the same on every rank, and so is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from colrow.inplace.apply import Applier
from colrow.inplace.calls import ModuleCall
from colrow.inplace.infer import Inference
from colrow.inplace.unit import linear_kind, output_dim
from colrow.inplace.vocabulary import plain_table, rows_of, split_table
from colrow.inplace.whole_results import Gathered, GatheredMixin
from colrow.partition import Partition

# Below this part of a model, spreading a layer is not worth a collective.
_SMALLEST = 1e-3


@dataclass
class GatheredLayers:
    """Layers to be split so, by name."""

    linears: dict[str, nn.Module]
    tables: dict[str, nn.Embedding]

    def only(self, allowed: Callable[[str], bool]) -> GatheredLayers:
        """Those that may be split."""
        return GatheredLayers(
            {n: m for n, m in self.linears.items() if allowed(n)},
            {n: m for n, m in self.tables.items() if allowed(n)},
        )


def gathered_layers(
    model: nn.Module,
    calls: Mapping[str, ModuleCall],
    inference: Inference,
    reserved: set[str],
    ranks: int,
) -> GatheredLayers:
    """The large layers that are called and are in no pair."""
    taken: set[int] = {id(p) for n in reserved for p in model.get_submodule(n).parameters()}
    for name, proofs in inference.proofs.items():
        module = model.get_submodule(name)
        for proof in proofs:
            group = proof.group
            for layer in (*group.columns, *group.rows):
                taken |= {id(p) for p in module.get_submodule(layer).parameters()}
            taken |= {id(module.get_parameter(n)) for n in (*group.parameters, *proof.shared)}
    total = sum(p.numel() for p in model.parameters())
    found = GatheredLayers({}, {})
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if name not in calls or not own or any(id(p) in taken for p in own):
            continue
        if own[0].numel() < _SMALLEST * total or any(holders[id(p)] > 1 for p in own):
            continue
        kind = linear_kind(module)
        if isinstance(module, nn.Embedding):
            plain = kind == "embedding" and plain_table(module)
            if plain and module.num_embeddings >= ranks and _tokens(calls[name]):
                found.tables[name] = module
            continue
        # A router's few scores are not worth a collective.
        if kind and own[0].shape[output_dim(kind)] >= 4 * ranks:
            found.linears[name] = module
    return found


def _tokens(call: ModuleCall) -> bool:
    """Whether a table was asked for anything but consecutive positions."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    ids = next((x for x in leaves if isinstance(x, Tensor)), None)
    if ids is None or ids.dim() == 0 or ids.is_floating_point():
        return False
    return not bool((ids.diff(dim=-1) == 1).all()) if ids.shape[-1] > 1 else False


def split_gathered(applier: Applier, layers: GatheredLayers) -> None:
    """Divides these layers over the ranks, each as evenly as possible."""
    for name, table in layers.tables.items():
        split_table(applier, name, table)
    for name, module in layers.linears.items():
        kind = linear_kind(module)
        assert kind is not None
        weight = module.get_parameter("weight")
        dim = output_dim(kind)
        partition = Partition.even(weight.shape[dim], applier.tp.size)
        applier.split(module, "weight", dim, rows_of(partition))
        if module._parameters.get("bias") is not None:
            applier.split(module, "bias", 0, rows_of(partition))
        how = Gathered(applier.tp, name, kind == "conv1d", partition)
        applier.attach(module, "colrow", how)
        applier.change_class(module, GatheredMixin)
