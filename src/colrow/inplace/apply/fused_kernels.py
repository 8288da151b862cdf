"""torch.nn's transformer layers without their fused kernels, which take whole weights.

In eval mode and without gradients ``torch.nn.TransformerEncoderLayer`` hands all its weights to one
kernel, and ``torch.nn.TransformerEncoder`` packs padded batches into nested tensors for it. Layers
of which a rank holds a part cannot use either. Packing leaves zeros in padded rows, so those are
set here where the whole model would have them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.apply.applier import Applier
from colrow.inplace.observe.modes import without_fused_kernels

_FORWARD = nn.TransformerEncoder.forward


def avoid_fused_kernels(applier: Applier) -> None:
    """Changes torch.nn's transformer layers of which something is divided."""
    for name, module in applier.model.named_modules():
        prefix = f"{name}." if name else ""
        if not any(path.startswith(prefix) for path in applier.record.specs):
            continue
        if type(module).forward is _FORWARD:
            applier.change_class(module, EncoderMixin)
        elif isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            applier.change_class(module, UnfusedMixin)


class UnfusedMixin(nn.Module):
    """A module that calls its inner layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, without fused kernels."""
        with without_fused_kernels():
            return super().forward(*args, **kwargs)


class EncoderMixin(nn.Module):
    """A stack of torch.nn's transformer layers."""

    norm: nn.Module | None

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The stack's own forward, with the zeros in padded rows that packing would leave."""
        packed = _packed(self, src, mask, src_key_padding_mask, is_causal)
        options = {
            "mask": mask,
            "src_key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal,
        }
        with without_fused_kernels():
            if packed is None:
                y: Tensor = super().forward(src, **options)
                return y
            norm, self._modules["norm"] = self.norm, None
            try:
                y = super().forward(src, **options)
            finally:
                self._modules["norm"] = norm
        y = y.masked_fill(packed, 0)
        return y if norm is None else norm(y)


def _packed(
    encoder: Any, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool | None
) -> Tensor | None:
    """The rows in which the whole model would have zeros, as ``[batch, sequence, 1]``, or None.

    torch itself is asked, by running its forward over layers that give back what they are given.
    """
    first = encoder.layers[0]
    if padding is None or src.dim() != 3 or not isinstance(first, nn.TransformerEncoderLayer):
        return None
    inner = {name: SimpleNamespace(**m._parameters) for name, m in first.named_children()}
    attention = first.self_attn
    inner["self_attn"] = SimpleNamespace(
        **attention._parameters,
        batch_first=attention.batch_first,
        out_proj=SimpleNamespace(**attention.out_proj._parameters),
    )
    empty = SimpleNamespace(
        layers=[_Echo(training=first.training, **inner)],
        norm=None,
        **{n: v for n, v in vars(encoder).items() if n in ("use_nested_tensor", "mask_check")},
    )
    ones = torch.ones_like(src).requires_grad_(src.requires_grad)
    rows = _FORWARD(empty, ones, mask, padding, is_causal)  # type: ignore[arg-type]
    return None if rows is ones else rows[..., :1] == 0


class _Echo(SimpleNamespace):
    """What torch asks a layer for, and a layer that does nothing."""

    def __call__(self, x: Tensor, **_: Any) -> Tensor:
        """``x``."""
        return x
