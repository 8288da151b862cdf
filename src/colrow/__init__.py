"""colrow: transformers, tensor-parallel.

The public API on one screen. Names are imported when they are first used, so that ``import colrow``
costs nothing and planning needs no torch.
"""

from typing import TYPE_CHECKING

from colrow._lazy import lazy_exports

if TYPE_CHECKING:
    from colrow.checkpoint.assemble import full_grads, full_state_dict
    from colrow.checkpoint.pretrained import from_pretrained
    from colrow.comm.collectives import (
        copy_to_tp,
        gather_from_sequence,
        gather_from_tp,
        reduce_from_tp,
        reduce_scatter_to_sequence,
        scatter_to_sequence,
        scatter_to_tp,
    )
    from colrow.comm.ledger import Ledger, record
    from colrow.layers.attention import ParallelAttention
    from colrow.layers.block import ParallelBlock
    from colrow.layers.dropout import ParallelDropout
    from colrow.layers.embedding import PositionEmbedding, VocabParallelEmbedding
    from colrow.layers.linear import (
        ColumnParallelLinear,
        FusedColumnParallelLinear,
        GateUpParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from colrow.layers.loss import vocab_parallel_cross_entropy
    from colrow.layers.mlp import ParallelMLP
    from colrow.layers.norm import LayerNorm, RMSNorm
    from colrow.mesh import Mesh, ParallelGroup, init_mesh
    from colrow.models.build import from_config
    from colrow.models.config import ModelConfig
    from colrow.models.decoder import Decoder
    from colrow.partition import HeadPartition, Partition, ShardSpec

__version__ = "0.1.0"

_MODULES = {
    "full_grads": "colrow.checkpoint.assemble",
    "full_state_dict": "colrow.checkpoint.assemble",
    "from_pretrained": "colrow.checkpoint.pretrained",
    "copy_to_tp": "colrow.comm.collectives",
    "gather_from_sequence": "colrow.comm.collectives",
    "gather_from_tp": "colrow.comm.collectives",
    "reduce_from_tp": "colrow.comm.collectives",
    "reduce_scatter_to_sequence": "colrow.comm.collectives",
    "scatter_to_sequence": "colrow.comm.collectives",
    "scatter_to_tp": "colrow.comm.collectives",
    "Ledger": "colrow.comm.ledger",
    "record": "colrow.comm.ledger",
    "ParallelAttention": "colrow.layers.attention",
    "ParallelBlock": "colrow.layers.block",
    "ParallelDropout": "colrow.layers.dropout",
    "PositionEmbedding": "colrow.layers.embedding",
    "VocabParallelEmbedding": "colrow.layers.embedding",
    "ColumnParallelLinear": "colrow.layers.linear",
    "FusedColumnParallelLinear": "colrow.layers.linear",
    "GateUpParallelLinear": "colrow.layers.linear",
    "QKVParallelLinear": "colrow.layers.linear",
    "RowParallelLinear": "colrow.layers.linear",
    "vocab_parallel_cross_entropy": "colrow.layers.loss",
    "ParallelMLP": "colrow.layers.mlp",
    "LayerNorm": "colrow.layers.norm",
    "RMSNorm": "colrow.layers.norm",
    "Mesh": "colrow.mesh",
    "ParallelGroup": "colrow.mesh",
    "init_mesh": "colrow.mesh",
    "from_config": "colrow.models.build",
    "ModelConfig": "colrow.models.config",
    "Decoder": "colrow.models.decoder",
    "HeadPartition": "colrow.partition",
    "Partition": "colrow.partition",
    "ShardSpec": "colrow.partition",
}

__all__ = [*_MODULES, "__version__"]

__getattr__ = lazy_exports(__name__, _MODULES)
