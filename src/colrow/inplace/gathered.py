"""What is in no pair: layers split by their output features, and other large parameters.

Of a layer the result is gathered, of a parameter that its module uses directly the parameter
itself. That spreads the weights, and needs no proof beyond the layer's own formula, since its input
and its result are the same on every rank, and so is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from colrow.inplace.apply import Applier
from colrow.inplace.calls import ModuleCall
from colrow.inplace.infer import Inference
from colrow.inplace.tuners import inside_adapter_layers
from colrow.inplace.unit import linear_kind, output_dim
from colrow.inplace.vocabulary import plain_table, rows_of, split_table
from colrow.inplace.whole_results import Gathered, GatheredMixin
from colrow.partition import Partition

# Below this part of a model, spreading a layer is not worth a collective.
_SMALLEST = 1e-3


@dataclass
class GatheredLayers:
    """What is to be split so, by name; of parameters, along which dimension."""

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
    """The large layers that are called and are in no pair."""
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
                    found.parameters[f"{name}.{last}" if name else last] = _dim(parameter, ranks)
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
    for path, dim in layers.parameters.items():
        owner, _, last = path.rpartition(".")
        applier.spread(applier.model.get_submodule(owner), last, path, dim)
