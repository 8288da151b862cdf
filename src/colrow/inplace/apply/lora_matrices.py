"""Splits the small matrices that a LoRA layer adds, as the layer is split that it wraps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.inplace.apply.applier import Applier
from colrow.inplace.apply.gradients import ColumnEntry, SumOutputGradient
from colrow.inplace.apply.layers import (
    ColumnMixin,
    ColumnSplit,
    EmbeddingMixin,
    GatheredMixin,
    GatheredSplit,
    HeadMixin,
    RowMixin,
    RowSplit,
    VocabularySplit,
)
from colrow.inplace.apply.pairs import Stream
from colrow.inplace.find.layer_groups import IndicesByRank
from colrow.inplace.find.shard_groups import indices_of, take
from colrow.layers.shared_rows import SharedRows
from colrow.partition import ShardSpec


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
        applier.attach(down, "colrow", RowSplit(tp, path_down, transposed=False))
        applier.change_class(down, RowMixin)
        if (magnitude := _magnitude(module, adapter)) is not None:
            applier.attach(magnitude, "colrow", tp)
            applier.change_class(magnitude, DoraRowMixin)
        applier.hook(drop.register_forward_pre_hook(MaskStream(stream := Stream(tp), inside=True)))
        applier.hook(drop.register_forward_hook(MaskStream(stream, inside=False)))
        return
    _cut(applier, up, "weight", 0, rows)
    if up.bias is not None:
        _cut(applier, up, "bias", 0, rows)
    if (magnitude := _magnitude(module, adapter)) is not None:
        _cut(applier, magnitude, "weight", 0, rows)
    how = base.colrow
    if isinstance(base, ColumnMixin):
        if how.entry is None:  # the gradient of its input is summed further up
            applier.sum_gradient(down, "weight", f"{path_down}.weight", counted_once=False)
        else:
            entry = ColumnEntry(tp, path_down)
            applier.hook(down.register_forward_hook(SumOutputGradient(entry)))
        local = applier.spec_of(up.weight)
        assert local is not None
        shared = SharedRows.of(local, tp.rank)
        mine = ColumnSplit(tp, path_up, False, shared, entry=None, alone=False)
        applier.attach(up, "colrow", mine)
        applier.change_class(up, ColumnMixin)
        if how.stream is not None:
            applier.hook(drop.register_forward_pre_hook(MaskStream(how.stream, inside=False)))
            applier.hook(drop.register_forward_hook(MaskStream(how.stream, inside=True)))
    elif isinstance(base, HeadMixin):
        assert isinstance(how, VocabularySplit)
        applier.attach(up, "colrow", how)  # the same: it says whether logits are gathered
        applier.change_class(up, HeadMixin)
    else:
        applier.attach(up, "colrow", GatheredSplit(tp, path_up, False, how.partition))
        applier.change_class(up, GatheredMixin)


def _magnitude(adapted: Any, adapter: str) -> nn.Module | None:
    vectors = adapted.lora_magnitude_vector
    return vectors[adapter] if vectors and adapter in vectors else None


def _cut(applier: Applier, owner: nn.Module, name: str, dim: int, rows: IndicesByRank) -> None:
    """Divides a parameter of an adapter, and from now on whole tensors that are loaded into it."""
    applier.split(owner, name, dim, rows)
    spec = applier.spec_of(owner._parameters[name])
    assert spec is not None
    applier.hook(owner.register_load_state_dict_pre_hook(LoadCut(name, spec, applier.tp.rank)))


class MaskStream:
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


class DoraRowMixin(nn.Module):
    """DoRA's magnitudes for a layer of which this rank has some input features."""

    colrow: ParallelGroup

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """The norm of each output feature's weights, over all ranks. Sends an all-reduce."""
        local: Tensor = super().get_weight_norm(*args, **kwargs)  # type: ignore[misc]
        squares = primitives.all_reduce(local.square(), self.colrow, layer="dora")
        return squares.sqrt()
