"""Keys and values of the tokens so far, so that one more token costs a forward pass of one."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of this rank's KV heads, in memory that is allocated once.

    Each layer holds two tensors ``[batch, kv_heads_local, capacity, head_dim]``; latent attention's
    are what keys and values are made of, and differ in their last size. Nothing is sent.
    Layers with a sliding window keep all positions too; their mask hides the old ones.

    Args:
        num_layers, batch, kv_heads, head_dim: sizes on this rank.
        capacity: positions to allocate. Where more come, the capacity doubles, which copies.
        dtype, device: of keys and values.
        value_dim: the last size of values; by default that of keys.
        first_layer: number of the first layer, on a later stage of a pipeline.
    """

    copies = True  # see colrow.layers.context.AttentionCache

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        value_dim: int | None = None,
        first_layer: int = 0,
    ) -> None:
        for name, size in (("num_layers", num_layers), ("batch", batch), ("capacity", capacity)):
            if size < 1:
                raise ValueError(f"{name}={size}: a key-value cache needs at least 1")
        self._keys, self._values = (
            [
                torch.empty(batch, kv_heads, capacity, size, dtype=dtype, device=device)
                for _ in range(num_layers)
            ]
            for size in (head_dim, head_dim if value_dim is None else value_dim)
        )
        self._length, self._first_layer = 0, first_layer

    @property
    def length(self) -> int:
        """Positions that every layer has stored: it grows when the last layer has its own.

        A forward pass that failed half-way therefore leaves no trace: the next one writes over it.
        """
        return self._length

    @property
    def capacity(self) -> int:
        """Positions that memory is there for."""
        return min(keys.shape[2] for keys in self._keys)

    @property
    def bytes(self) -> int:
        """Memory of all layers on this rank."""
        return sum(x.numel() * x.element_size() for x in (*self._keys, *self._values))

    def clear(self) -> None:
        """Forgets all positions; the memory stays."""
        self._length = 0

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores ``[batch, kv_heads_local, new, head_dim]`` behind what was there.

        Args:
            layer: its number in the whole model.

        Returns:
            Keys and values of all positions so far, ``[batch, kv_heads_local, length + new,
            head_dim]``: views, valid until the next update.

        Raises:
            ValueError: when another batch size, head count or head size is stored already.
        """
        place = layer - self._first_layer
        stored, past, new = self._keys[place], self.length, keys.shape[2]
        expected, expected_values = (
            (*held.shape[:2], new, held.shape[3]) for held in (stored, self._values[place])
        )
        if tuple(keys.shape) != expected or tuple(values.shape) != expected_values:
            raise ValueError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} of layer {layer} do "
                f"not continue a cache of {tuple(stored.shape)}: should be {expected}"
            )
        total = past + new
        if total > stored.shape[2]:
            capacity = max(total, 2 * stored.shape[2])
            self._keys[place] = _grown(stored, past, capacity)
            self._values[place] = _grown(self._values[place], past, capacity)
        held, held_values = self._keys[place], self._values[place]
        held.narrow(2, past, new).copy_(keys)
        held_values.narrow(2, past, new).copy_(values)
        if place == len(self._keys) - 1:
            self._length = total
        return held.narrow(2, 0, total), held_values.narrow(2, 0, total)


def _grown(x: Tensor, used: int, capacity: int) -> Tensor:
    larger = x.new_empty(*x.shape[:2], capacity, x.shape[3])
    larger[:, :, :used] = x[:, :, :used]
    return larger
