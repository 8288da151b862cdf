"""What all attention layers of one forward pass share: positions, masks, the key-value cache."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from colrow.layers.options import RopeConfig
from colrow.layers.position import rope_frequencies, rope_tables
from colrow.partition import Partition


class AttentionCache(Protocol):
    """Keys and values of earlier positions, per layer.

    One whose ``update`` copies what it is given may say so with an attribute ``copies = True``; it
    is then given memory that is used again for the next layer.
    """

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
            valid token by default. They need not ascend: documents that are packed into one
            sequence may each start at 0. Which keys a query sees follows the order of the
            tokens, not these.
        device: where masks live.

    Raises:
        ValueError: positions of another shape.
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
        if positions is not None and (positions.dim() != 2 or positions.shape[1] != queries):
            raise ValueError(
                f"positions should be [batch or 1, {queries}], one for each new token, "
                f"got {tuple(positions.shape)}"
            )
        # Positions of all keys; None when those of the cached ones are not known.
        self.key_positions: Tensor | None
        if positions is not None:
            self.key_positions = None if past else positions
            self.positions = positions
        else:
            if key_valid is not None:
                self.key_positions = (key_valid.long().cumsum(-1) - 1).clamp(min=0)
            else:
                self.key_positions = torch.arange(past + queries, device=device).unsqueeze(0)
            self.positions = self.key_positions[:, past:]
        self._rope: dict[object, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor | None] = {}
        self._full_masks: dict[int | None, Tensor] = {}
        self._alibi: dict[object, Tensor] = {}

    def rope(
        self, frequencies: Tensor, config: RopeConfig, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Rotations of the new positions.

        Those that depend on the length follow the largest new position, in the whole batch, as in
        transformers: what a cache holds stays as it was rotated when it was new.
        """
        key = (config, dtype)
        if key not in self._rope:
            if config.by_length:
                length = int(self.positions.max()) + 1
                frequencies = rope_frequencies(config, "cpu", length=length).to(frequencies.device)
            self._rope[key] = rope_tables(config, frequencies, self.positions, dtype)
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
        if window not in self._full_masks:
            mask = self.mask(window)
            self._full_masks[window] = self._causal(window)[None, None] if mask is None else mask
        return self._full_masks[window]

    def alibi(
        self, slopes: Tensor, heads: Partition, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        """``[batch or 1, heads_local, queries, keys]``: linear biases, -inf where nothing is seen.

        The bias of a head is its slope times the distance of the positions (Press et al. 2021).

        Args:
            slopes: ``[heads_local]``, those of this rank's heads.
            heads: how the query heads are divided, which tells layers apart.

        Raises:
            ValueError: for explicit positions with a cache, which does not hold the positions of
                its keys.
        """
        if self.key_positions is None:
            raise ValueError(
                "ALiBi with explicit positions needs those of the cached keys too, and the cache "
                "does not hold them: leave positions out, or give the whole sequence without a "
                "cache"
            )
        key = (heads, window, dtype)
        if key not in self._alibi:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            distance = self.positions[:, :, None] - self.key_positions[:, None, :]
            bias = -slopes.to(wide).view(1, -1, 1, 1) * distance.unsqueeze(1).to(wide)
            self._alibi[key] = bias.to(dtype).masked_fill(~self.full_mask(window), -math.inf)
        return self._alibi[key]

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
        slots = torch.arange(self.past + self.queries, device=self.positions.device)
        return slots[self.past :, None] - slots[None, :]
