"""What a layer is, as a value: its parameters and who holds them, what it sends and multiplies.

Plain Python, no torch. Layers are built from these values, and whoever has to know a layer without
running it walks them: loading, saving, predicted traffic, planning, the balance of stages. Two
kinds build on each other. *Parts* (:class:`ColumnSpec`, :class:`RowSpec`, :class:`NormSpec`,
:class:`EmbeddingSpec`, :class:`TableSpec`, :class:`SinksSpec`, :class:`RouterSpec`,
:class:`StackedSpec`) are single layers as a group of ranks divides them.
*Compositions* (:class:`AttentionSpec`, :class:`MLPSpec`, :class:`ExpertsSpec`, :class:`BlockSpec`)
say what a model has; given a :class:`Division` they list their parts by name. Who meets a
composition that it does not know calls :func:`unknown`.
"""

from colrow.layers.describe.attention import Attention, AttentionSpec, LatentAttentionSpec
from colrow.layers.describe.block import BlockSpec
from colrow.layers.describe.mlp import ExpertsSpec, FeedForward, MLPSpec, Routing
from colrow.layers.describe.parts import (
    ColumnSpec,
    Division,
    EmbeddingSpec,
    Exchange,
    Gradient,
    Linear,
    NormSpec,
    ParameterSpec,
    Part,
    RouterSpec,
    RowSpec,
    SinksSpec,
    StackedSpec,
    Start,
    TableSpec,
    elements_of,
    parameters_of,
    unknown,
)

__all__ = [
    "Attention",
    "AttentionSpec",
    "BlockSpec",
    "ColumnSpec",
    "Division",
    "EmbeddingSpec",
    "Exchange",
    "ExpertsSpec",
    "FeedForward",
    "Gradient",
    "LatentAttentionSpec",
    "Linear",
    "MLPSpec",
    "NormSpec",
    "ParameterSpec",
    "Part",
    "RouterSpec",
    "Routing",
    "RowSpec",
    "SinksSpec",
    "StackedSpec",
    "Start",
    "TableSpec",
    "elements_of",
    "parameters_of",
    "unknown",
]
