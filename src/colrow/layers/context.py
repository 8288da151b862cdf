"""What all attention layers of one forward pass share: positions, masks, the key-value cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from colrow.layers.options import RopeConfig
from colrow.layers.position import rope_tables


class KeyValueCache(Protocol):
    """Keys and values of earlier positions, per layer."""

    @property
    def length(self) -> int:
        """Positions stored so far."""
        ...

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends ``[batch, kv_heads_local, new, head_dim]``; returns everything so far."""
        ...


class AttentionContext:
    """What all layers of one forward pass share: positions, rotations and masks, each made once.

    Args:
        queries: number of new positions.
        past: number of cached positions before them.
        key_valid: ``[batch, past + queries]`` bool, False at padding; None when there is none.
        positions: ``[batch or 1, queries]`` position of each new token; counted from the first
            valid token by default.
        device: where masks live.
    """

    def __init__(
        self,
        queries: int,
        *,
        past: int = 0,
        key_valid: Tensor | None = None,
        positions: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.queries, self.past, self.key_valid = queries, past, key_valid
        if key_valid is not None:
            self.key_positions = (key_valid.long().cumsum(-1) - 1).clamp(min=0)
        else:
            self.key_positions = torch.arange(past + queries, device=device).unsqueeze(0)
        self.positions = self.key_positions[:, past:] if positions is None else positions
        self._rope: dict[object, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor | None] = {}

    def rope(
        self, frequencies: Tensor, config: RopeConfig, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Rotations of the new positions."""
        key = (config, dtype)
        if key not in self._rope:
            self._rope[key] = rope_tables(frequencies, self.positions, dtype)
        return self._rope[key]

    def mask(self, window: int | None) -> Tensor | None:
        """``[batch or 1, 1, queries, keys]`` bool, True where a query sees a key; None when plain.

        Plain means: every query sees all keys up to its own. Padding sees itself, so that no row
        is empty; nobody reads the result.
        """
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def full_mask(self, window: int | None) -> Tensor:
        """As :meth:`mask`, spelled out also when plain."""
        mask = self.mask(window)
        return self._causal(window).unsqueeze(0).unsqueeze(0) if mask is None else mask

    def _make_mask(self, window: int | None) -> Tensor | None:
        keys = self.past + self.queries
        if self.key_valid is None and (window is None or keys <= window):
            plain = self.past == 0 or self.queries == 1
            return None if plain else self._causal(None).unsqueeze(0).unsqueeze(0)
        mask = self._causal(window).unsqueeze(0)
        if self.key_valid is not None:
            own = self._distance() == 0
            mask = (mask & self.key_valid.unsqueeze(1)) | own
        return mask.unsqueeze(1)

    def _causal(self, window: int | None) -> Tensor:
        distance = self._distance()
        seen = distance >= 0
        return seen if window is None else seen & (distance < window)

    def _distance(self) -> Tensor:
        slots = torch.arange(self.past + self.queries, device=self.key_positions.device)
        return slots[self.past :, None] - slots[None, :]
