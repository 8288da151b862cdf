"""colrow: transformers, tensor-parallel.

The public API on one screen. Names are imported when they are first used, so that ``import colrow``
costs nothing and planning needs no torch.
"""

from typing import TYPE_CHECKING

from colrow._lazy import lazy_exports

if TYPE_CHECKING:
    from colrow.checkpoint.assemble import full_grads, full_state_dict
    from colrow.checkpoint.pretrained import from_pretrained
    from colrow.checkpoint.training import TrainingCheckpoints
    from colrow.comm.collectives import (
        copy_to_tp,
        gather_from_sequence,
        gather_from_tp,
        reduce_from_tp,
        reduce_scatter_to_sequence,
        scatter_to_sequence,
        scatter_to_tp,
    )
    from colrow.comm.group import ParallelGroup
    from colrow.comm.ledger import Ledger, record
    from colrow.comm.mesh import Mesh, init_mesh
    from colrow.inplace.api import parallelize, plan_for
    from colrow.inplace.weights.load import load_weights
    from colrow.inplace.weights.save import save_pretrained
    from colrow.layers.attention import ParallelAttention
    from colrow.layers.block import ParallelBlock
    from colrow.layers.column import (
        ColumnParallelLinear,
        FusedColumnParallelLinear,
        GateUpParallelLinear,
        QKVParallelLinear,
    )
    from colrow.layers.dropout import ParallelDropout
    from colrow.layers.embedding import PositionEmbedding, VocabParallelEmbedding
    from colrow.layers.loss import vocab_parallel_cross_entropy
    from colrow.layers.mlp import ParallelMLP
    from colrow.layers.norm import LayerNorm, RMSNorm
    from colrow.layers.row import RowParallelLinear
    from colrow.models.build import from_config
    from colrow.models.config import ModelConfig
    from colrow.models.decoder import Decoder
    from colrow.optim.adafactor import Adafactor
    from colrow.optim.check import check_optimizer
    from colrow.optim.muon import Muon
    from colrow.optim.scaler import GradScaler
    from colrow.partition import HeadPartition, Partition, ShardSpec
    from colrow.train.clip import clip_grad_norm_

__version__ = "0.1.0"

_EXPORTS = {
    "colrow.checkpoint.assemble": ["full_grads", "full_state_dict"],
    "colrow.checkpoint.pretrained": ["from_pretrained"],
    "colrow.checkpoint.training": ["TrainingCheckpoints"],
    "colrow.comm.collectives": [
        "copy_to_tp",
        "gather_from_sequence",
        "gather_from_tp",
        "reduce_from_tp",
        "reduce_scatter_to_sequence",
        "scatter_to_sequence",
        "scatter_to_tp",
    ],
    "colrow.comm.ledger": ["Ledger", "record"],
    "colrow.layers.attention": ["ParallelAttention"],
    "colrow.layers.block": ["ParallelBlock"],
    "colrow.layers.dropout": ["ParallelDropout"],
    "colrow.layers.embedding": ["PositionEmbedding", "VocabParallelEmbedding"],
    "colrow.layers.column": [
        "ColumnParallelLinear",
        "FusedColumnParallelLinear",
        "GateUpParallelLinear",
        "QKVParallelLinear",
    ],
    "colrow.layers.row": ["RowParallelLinear"],
    "colrow.layers.loss": ["vocab_parallel_cross_entropy"],
    "colrow.layers.mlp": ["ParallelMLP"],
    "colrow.layers.norm": ["LayerNorm", "RMSNorm"],
    "colrow.comm.group": ["ParallelGroup"],
    "colrow.comm.mesh": ["Mesh", "init_mesh"],
    "colrow.models.build": ["from_config"],
    "colrow.models.config": ["ModelConfig"],
    "colrow.models.decoder": ["Decoder"],
    "colrow.inplace.api": ["parallelize", "plan_for"],
    "colrow.inplace.weights.load": ["load_weights"],
    "colrow.inplace.weights.save": ["save_pretrained"],
    "colrow.optim.adafactor": ["Adafactor"],
    "colrow.optim.check": ["check_optimizer"],
    "colrow.optim.muon": ["Muon"],
    "colrow.optim.scaler": ["GradScaler"],
    "colrow.partition": ["HeadPartition", "Partition", "ShardSpec"],
    "colrow.train.clip": ["clip_grad_norm_"],
}

__all__ = [
    "Adafactor",
    "ColumnParallelLinear",
    "Decoder",
    "FusedColumnParallelLinear",
    "GateUpParallelLinear",
    "GradScaler",
    "HeadPartition",
    "LayerNorm",
    "Ledger",
    "Mesh",
    "ModelConfig",
    "Muon",
    "ParallelAttention",
    "ParallelBlock",
    "ParallelDropout",
    "ParallelGroup",
    "ParallelMLP",
    "Partition",
    "PositionEmbedding",
    "QKVParallelLinear",
    "RMSNorm",
    "RowParallelLinear",
    "ShardSpec",
    "TrainingCheckpoints",
    "VocabParallelEmbedding",
    "__version__",
    "check_optimizer",
    "clip_grad_norm_",
    "copy_to_tp",
    "from_config",
    "from_pretrained",
    "full_grads",
    "full_state_dict",
    "gather_from_sequence",
    "gather_from_tp",
    "init_mesh",
    "load_weights",
    "parallelize",
    "plan_for",
    "record",
    "reduce_from_tp",
    "reduce_scatter_to_sequence",
    "save_pretrained",
    "scatter_to_sequence",
    "scatter_to_tp",
    "vocab_parallel_cross_entropy",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)
