"""How much of a model a split really spread over the ranks, counted from what the ranks hold."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch.distributed as dist
from torch import nn

from colrow.comm.compat import local_tensor
from colrow.comm.mesh import Mesh

_ROUTER = re.compile(r"(^|\.)(gate|router|wg|classifier)(\.|$)")


def counted_parameters(model: nn.Module) -> dict[str, int]:
    """Elements of the weights of attention, MLPs, embedding and head, by parameter.

    These are all parameters with two or more dimensions, but for tables of positions and types
    (embeddings that are not of the vocabulary's length), filters over images, and the routers of
    experts.
    """
    vocabularies = _vocabularies(model)
    skipped = set()
    for prefix, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding)
        if (is_table and module.num_embeddings not in vocabularies) or isinstance(
            module, nn.Conv2d
        ):
            skipped.add(f"{prefix}.weight")
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2
        and name not in skipped
        and "position" not in name
        and not _ROUTER.search(name)
    }


def _vocabularies(model: nn.Module) -> set[int]:
    configs = [getattr(module, "config", None) for module in model.modules()]
    return {getattr(config, "vocab_size", 0) for config in configs if config is not None}


def share_split(
    model: nn.Module, counted: dict[str, int], mesh: Mesh, used: Collection[str]
) -> float:
    """The share of ``counted`` of which a rank does not hold the whole: 1 when each rank holds
    1/tp of every one of them, 0 when each holds all.

    A parameter that cannot be found under its name counts as not split; one that the model did not
    use in its loss, such as the cross attention of a decoder alone, does not count.

    Communicates: every rank must call it; sizes only.
    """
    mine = {name: local_tensor(parameter).numel() for name, parameter in model.named_parameters()}
    everyone: list[dict[str, int]] = [{}] * mesh.tp.size
    dist.all_gather_object(everyone, mine, group=mesh.tp.group)
    tp, split = mesh.tp.size, 0.0
    counted = {name: elements for name, elements in counted.items() if name in used}
    for name, elements in counted.items():
        held = sum(theirs.get(name, elements) for theirs in everyone)
        split += (tp * elements - held) / (tp - 1)
    total = sum(counted.values())
    return max(0.0, split / total) if total else 0.0
