"""Which models, and what one rank holds of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from colrow import ParallelGroup
from colrow.head_partition import HeadPartition
from colrow.layers.describe import AttentionSpec, Division
from colrow.models.compose import decoder, fields_of, with_dropout
from colrow.models.config import ModelConfig, common_attention
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
    def division(self) -> Division:
        return self.config.divide(self.ranks)

    @property
    def attention(self) -> AttentionSpec:
        return common_attention(self.config)

    @property
    def heads(self) -> HeadPartition:
        """Which rank computes which heads."""
        return self.attention.heads(self.division)

    @property
    def block_flops(self) -> float:
        """Multiplications and additions of a block's forward pass: matmuls, causal attention.

        Of the attention only the half that a causal mask leaves counts.
        """
        linears = self.config.blocks[0].linears(self.division, 0)
        per_token = sum(linear.inputs * linear.outputs for linear in linears)
        attention = 2 * self.heads.query.size(0) * self.attention.head_dim * self.sequence / 2
        return 2.0 * self.tokens * (per_token + attention)


def shares(small: bool) -> list[Share]:
    """The three of the literature, or their families in tiny."""
    chosen = (("llama-3-8b", 1, 1, 8192), ("llama-3-70b", 8, 1, 8192), ("gpt3-175b", 8, 4, 2048))
    found = []
    for name, ranks, batch, sequence in chosen:
        config = with_dropout(find_model(name).config, 0.0)
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
    return replace(share.config, blocks=share.config.blocks[:layers])


def _tiny(config: ModelConfig) -> ModelConfig:
    fields = fields_of(config)
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 16,
        "num_kv_heads": 8 if fields["num_kv_heads"] < fields["num_heads"] else 16,
        "head_dim": 4,
        "ffn_size": 128,
        "max_positions": 64,
    }
    if fields["rope"] is not None:
        fields["rope"] = replace(fields["rope"], dims=4)
    return decoder(**{**fields, **sizes})


def dtype_of(name: str) -> torch.dtype:
    """ "bf16" or "fp32"."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
