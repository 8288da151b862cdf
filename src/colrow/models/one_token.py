"""One more token of one sequence on a CPU: the decoder's forward pass, written out flat.

With one token a call costs more than its arithmetic, and the modules' calls of each other are a
fifth of the time. Here a layer is some twenty operations in a row, on the modules' own parameters
and with the same collectives; nothing has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.comm import primitives
from colrow.layers.activation import ACTIVATIONS
from colrow.layers.block import ParallelBlock
from colrow.layers.column import FusedColumnParallelLinear
from colrow.layers.context import AttentionContext, KeyValueCache
from colrow.layers.norm import RMSNorm, normed_row
from colrow.layers.position import apply_rope
from colrow.layers.row import RowParallelLinear

if TYPE_CHECKING:
    from colrow.models.staged_layers import StagedLayers

_Step = Callable[[Tensor], Tensor]
_Block = Callable[[Tensor, AttentionContext, KeyValueCache], Tensor]


class OneToken:
    """The blocks of a decoder, for one token.

    Parameters are looked up in their modules in every pass, so new ones are seen. Where a module
    has been replaced or wrapped since, the pass is left to the modules themselves.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._modules = list(blocks.modules())
        self._places = [
            (parent._modules, name, child)
            for parent in self._modules
            for name, child in parent._modules.items()
        ]
        known = [block for block in blocks if isinstance(block, ParallelBlock)]
        self._drops = any(block.dropout.p + block.attention.dropout.p for block in known)
        self._blocks = [_flat(block) for block in known]

    def __reduce__(self) -> Any:
        """Nothing: it belongs to these modules, and not to a copy of them."""
        return type(None), ()

    @staticmethod
    def fits(model: StagedLayers) -> bool:
        """Whether the model is of the kind that is written out here: RoPE over all keys."""
        attentions = [b.attention for b in model.blocks if isinstance(b, ParallelBlock)]
        return (
            next(model.parameters()).is_cpu
            and not model.sequence_parallel
            and len(model.stages) == 1
            and all(a.rope is not None and a.window is None for a in attentions)
            and all(a.query_norm is None and not a.alibi for a in attentions)
        )

    def serves(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether this pass is one token of one sequence, without padding or gradient."""
        return (
            input_ids.numel() == 1
            and attention_mask is None
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not (self._drops and self._modules[0].training)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)
            and all(children[name] is child for children, name, child in self._places)
        )

    def __call__(self, x: Tensor, context: AttentionContext, cache: KeyValueCache) -> Tensor:
        """``[1, 1, hidden]`` to the same behind the last block; as the blocks, it extends cache."""
        shape, x = x.shape, x.view(1, -1)
        for block in self._blocks:
            x = block(x, context, cache)
        return x.view(shape)


def _flat(block: ParallelBlock) -> _Block:
    attention, mlp, parallel_residual = block.attention, block.mlp, block.parallel_residual
    attention_norm, mlp_norm = _norm(block.attention_norm), _norm(block.mlp_norm)
    qkv, output = _column(attention.qkv), _row(attention.output)
    up, down = _column(mlp.up), _row(mlp.down)
    act, gated = ACTIVATIONS[mlp.activation], mlp.gated
    head_dim, index, rope = attention.head_dim, attention.layer_index, attention.rope
    queries, keys = attention.q_heads, attention.kv_heads
    padded = len(attention.runs) > 1
    buffers: dict[str, Any] = attention._buffers
    if rope is None:
        raise ValueError(f"{attention.qkv.layer} has no rotary positions, see OneToken.fits")

    def forward(x: Tensor, context: AttentionContext, cache: KeyValueCache) -> Tensor:
        rotation = context.rope(buffers["frequencies"], rope, x.dtype)
        fused = qkv(attention_norm(x)).view(1, 1, -1, head_dim)
        qk = apply_rope(fused.narrow(2, 0, queries + keys), rotation)
        q = qk.narrow(2, 0, queries).view(1, queries, 1, head_dim)
        k, v = cache.update(
            index,
            qk.narrow(2, queries, keys).view(1, keys, 1, head_dim),
            fused.narrow(2, queries + keys, keys).view(1, keys, 1, head_dim),
        )
        if padded:
            q = q.index_select(1, buffers["padded"])
        q = q.view(1, keys, -1, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v).view(-1, head_dim)
        if padded:
            mixed = mixed.index_select(0, buffers["unpadded"])
        residual = x + output(mixed.view(1, -1))
        hidden = up(mlp_norm(x if parallel_residual else residual))
        if gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = act(gate).mul_(hidden)
        else:
            hidden = act(hidden)
        return residual.add_(down(hidden))

    return forward


def _norm(norm: nn.Module) -> _Step:
    if not isinstance(norm, RMSNorm):
        step: _Step = norm.forward
        return step
    parameters: dict[str, Any] = norm._parameters
    eps = norm.eps
    return lambda x: normed_row(x, parameters["weight"], eps)


def _column(layer: FusedColumnParallelLinear) -> _Step:
    parameters: dict[str, Any] = layer._parameters
    kernel = layer.kernel
    if kernel is None:
        return lambda x: F.linear(x, parameters["weight"], parameters.get("bias"))
    return lambda x: kernel(x, parameters["weight"], parameters.get("bias"))


def _row(layer: RowParallelLinear) -> _Step:
    parameters: dict[str, Any] = layer._parameters
    kernel, tp, name = layer.kernel, layer.tp, layer.layer
    linear = F.linear if kernel is None else kernel

    def forward(x: Tensor) -> Tensor:
        partial = linear(x, parameters["weight"], None)
        y = primitives.all_reduce(partial, tp, layer=name, in_place=True)
        bias = parameters.get("bias")
        return y if bias is None else y + bias

    return forward
