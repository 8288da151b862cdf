"""Which blocks a pipeline device holds."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from colrow.layers.describe import BlockSpec
from colrow.models.stages import Costs, balanced, layer_costs
from colrow.planner.model import ModelShape
from colrow.planner.software import StageRule


def layers_of_stages(
    model: ModelShape, stages: int, chunks: int, given: tuple[int, ...], rule: StageRule
) -> tuple[int, ...]:
    """Transformer layers of each pipeline device.

    Args:
        chunks: of layers per device; with more than one the devices' layers are as even as can be.
        given: what they are, when not as the rule says.

    Raises:
        ValueError: when there are more stages than layers, or the given layers do not add up.
    """
    layers = model.config.num_layers
    if given:
        if sum(given) != layers or min(given) < 0:
            raise ValueError(
                f"stage_layers {list(given)} add up to {sum(given)}, but {model.name} has {layers} "
                "layers"
            )
        return given
    if stages * chunks > layers:
        raise ValueError(
            f"{model.name} has {layers} layers, too few for {stages} stages"
            + (f" of {chunks} virtual stages" if chunks > 1 else "")
        )
    if stages > 1 and chunks == 1 and rule != "even":
        return _by_cost(model, stages, rule)
    share, remainder = divmod(layers, stages)
    middle = sorted(range(stages), key=lambda stage: abs(stage - (stages - 1) / 2))
    extra = set(middle[:remainder])
    return tuple(share + (stage in extra) for stage in range(stages))


@lru_cache(maxsize=1024)
def _by_cost(model: ModelShape, stages: int, rule: StageRule) -> tuple[int, ...]:
    layers, costs = model.config.num_layers, layer_costs(model.config)
    return (balanced if rule == "balanced" else _filled)(layers, stages, costs)


def _filled(layers: int, stages: int, costs: Costs) -> tuple[int, ...]:
    """A stage takes layers until they and those before exceed its share of the whole cost."""
    whole = layers * costs.block + costs.last
    sizes = [0] * stages
    stage = 0
    for layer in range(layers):
        sizes[stage] += 1
        if (layer + 1) * costs.block > whole * (stage + 1) / stages and stage + 1 < stages:
            stage += 1
    return tuple(sizes)


@lru_cache(maxsize=1024)
def kinds_of_stages(
    model: ModelShape, sizes: tuple[int, ...], turns: int
) -> tuple[dict[BlockSpec, int], ...]:
    """Of each device the kinds of its blocks, and how many of each.

    Stages are consecutive blocks, in so many turns round the devices. A stage without blocks has
    none of the model's first kind.
    """
    found: tuple[Counter[BlockSpec], ...] = tuple(Counter() for _ in sizes)
    start = 0
    for turn in range(turns):
        for kinds, size in zip(found, sizes, strict=True):
            stop = start + size * (turn + 1) // turns - size * turn // turns
            kinds.update(model.config.blocks[start:stop])
            start = stop
    return tuple(kinds or {model.config.blocks[0]: 0} for kinds in found)
