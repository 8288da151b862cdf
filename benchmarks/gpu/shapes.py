"""Which models, and what one rank holds of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from colrow import ParallelGroup
from colrow.models.config import Layout, ModelConfig
from colrow.planner.catalog import find_model


@dataclass(frozen=True)
class Share:
    """One rank's share of a model.

    Attributes:
        name: of the model.
        ranks: tensor-parallel size; this is the first rank.
        batch, sequence: of a step.
    """

    name: str
    config: ModelConfig
    ranks: int
    batch: int
    sequence: int

    @property
    def label(self) -> str:
        return f"{self.name}, tp={self.ranks}, {self.batch} x {self.sequence} tokens"

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def layout(self) -> Layout:
        return self.config.divide(self.ranks)

    @property
    def block_flops(self) -> float:
        """Multiplications and additions of a block's forward pass: matmuls, causal attention.

        Of the attention only the half that a causal mask leaves counts.
        """
        config, layout = self.config, self.layout
        heads, kv_heads = layout.heads.query.size(0), layout.heads.key_value.size(0)
        per_token = config.hidden_size * config.head_dim * (2 * heads + 2 * kv_heads)
        per_token += config.hidden_size * layout.ffn.size(0) * (3 if config.gated else 2)
        attention = 2 * heads * config.head_dim * self.sequence / 2
        return 2.0 * self.tokens * (per_token + attention)


def shares(small: bool) -> list[Share]:
    """The three of the literature, or their families in tiny."""
    chosen = (("llama-3-8b", 1, 1, 8192), ("llama-3-70b", 8, 1, 8192), ("gpt3-175b", 8, 4, 2048))
    found = []
    for name, ranks, batch, sequence in chosen:
        config = replace(
            find_model(name).config,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            residual_dropout=0.0,
        )
        if small:
            config = _tiny(config)
            batch, sequence = 1, 8
        found.append(Share(name + (" in tiny" if small else ""), config, ranks, batch, sequence))
    return found


def group(ranks: int) -> ParallelGroup:
    """The first rank of a group that is not there: nothing is sent, and nothing is waited for.

    torch's "fake" process group leaves buffers as they are. What is computed behind a collective
    is therefore not what a real group would give; how long it takes is.
    """
    if ranks == 1:
        return ParallelGroup.single()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    if dist.get_world_size() != ranks:
        raise RuntimeError(f"there is a fake group of {dist.get_world_size()} ranks already")
    return ParallelGroup(dist.group.WORLD, 0, ranks)


def leave() -> None:
    """Ends the group that is not there."""
    if dist.is_initialized() and dist.get_backend() == "fake":
        dist.destroy_process_group()


def whole_model(share: Share, layers: int) -> ModelConfig:
    """Its configuration with fewer layers."""
    return replace(share.config, num_layers=layers, windows=share.config.windows[:layers])


def _tiny(config: ModelConfig) -> ModelConfig:
    kv_heads = 8 if config.num_kv_heads < config.num_heads else 16
    return replace(
        config,
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=16,
        num_kv_heads=kv_heads,
        head_dim=4,
        ffn_size=128,
        max_positions=64,
        rope=None if config.rope is None else replace(config.rope, dims=4),
        windows=(),
    )


def dtype_of(name: str) -> torch.dtype:
    """ "bf16" or "fp32"."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
