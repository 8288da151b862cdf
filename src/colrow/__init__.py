"""colrow: transformers, tensor-parallel.

The public API on one screen. Names are imported when they are first used, so that ``import colrow``
costs nothing and planning needs no torch.
"""

__version__ = "0.2.0"

TYPE_CHECKING = False  # typing's, which is not imported for it
if TYPE_CHECKING:
    from colrow.any_model.loading import load_model as load_model
    from colrow.checkpoint.assemble import full_grads as full_grads
    from colrow.checkpoint.assemble import full_state_dict as full_state_dict
    from colrow.checkpoint.pretrained import from_pretrained as from_pretrained
    from colrow.checkpoint.training import TrainingCheckpoints as TrainingCheckpoints
    from colrow.comm.collectives import copy_to_tp as copy_to_tp
    from colrow.comm.collectives import gather_from_sequence as gather_from_sequence
    from colrow.comm.collectives import gather_from_tp as gather_from_tp
    from colrow.comm.collectives import reduce_from_tp as reduce_from_tp
    from colrow.comm.collectives import reduce_scatter_to_sequence as reduce_scatter_to_sequence
    from colrow.comm.collectives import scatter_to_sequence as scatter_to_sequence
    from colrow.comm.collectives import scatter_to_tp as scatter_to_tp
    from colrow.comm.group import ParallelGroup as ParallelGroup
    from colrow.comm.ledger import Ledger as Ledger
    from colrow.comm.ledger import record as record
    from colrow.comm.mesh import Mesh as Mesh
    from colrow.comm.mesh import init_mesh as init_mesh
    from colrow.generation.generate import generate as generate
    from colrow.generation.sampling_settings import Sampling as Sampling
    from colrow.head_partition import HeadPartition as HeadPartition
    from colrow.inplace.api import parallelize as parallelize
    from colrow.inplace.api import plan_for as plan_for
    from colrow.inplace.weights.load import load_weights as load_weights
    from colrow.inplace.weights.save import save_pretrained as save_pretrained
    from colrow.layers.attention import ParallelAttention as ParallelAttention
    from colrow.layers.block import ParallelBlock as ParallelBlock
    from colrow.layers.column import ColumnParallelLinear as ColumnParallelLinear
    from colrow.layers.column import FusedColumnParallelLinear as FusedColumnParallelLinear
    from colrow.layers.column import GateUpParallelLinear as GateUpParallelLinear
    from colrow.layers.column import QKVParallelLinear as QKVParallelLinear
    from colrow.layers.dropout import ParallelDropout as ParallelDropout
    from colrow.layers.embedding import PositionEmbedding as PositionEmbedding
    from colrow.layers.embedding import VocabParallelEmbedding as VocabParallelEmbedding
    from colrow.layers.loss import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
    from colrow.layers.mlp import ParallelMLP as ParallelMLP
    from colrow.layers.norm import LayerNorm as LayerNorm
    from colrow.layers.norm import RMSNorm as RMSNorm
    from colrow.layers.row import RowParallelLinear as RowParallelLinear
    from colrow.models.build import from_config as from_config
    from colrow.models.config import ModelConfig as ModelConfig
    from colrow.models.decoder import Decoder as Decoder
    from colrow.optim.adafactor import Adafactor as Adafactor
    from colrow.optim.muon import Muon as Muon
    from colrow.optim.scaler import GradScaler as GradScaler
    from colrow.partition import Partition as Partition
    from colrow.partition import ShardSpec as ShardSpec
    from colrow.sharding import Sharding as Sharding
    from colrow.shards.optimizers import check_optimizer as check_optimizer
    from colrow.train.clip import clip_grad_norm_ as clip_grad_norm_
    from colrow.verification.verify import verify as verify
else:
    from colrow._lazy import lazy_exports

    __getattr__, __dir__ = lazy_exports(__name__, __file__)
