"""A transformer block: attention, what follows it, their norms and residual connections."""

from __future__ import annotations

from dataclasses import dataclass, replace

from colrow.layers.describe.attention import Attention
from colrow.layers.describe.mlp import FeedForward
from colrow.layers.describe.parts import Division, Exchange, Linear, NormSpec, Part


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block.

    Serial: ``x += post(attention(pre(x)))``, then the same with the MLP. Parallel: both read the
    block's input and are added together.

    Attributes:
        attention, mlp: the two layers.
        attention_norm, mlp_norm: norms in front of them, or None.
        attention_post_norm, mlp_post_norm: norms behind them, before they are added, or None.
        parallel_residual: which of the two forms.
        one_norm: of a parallel block: the MLP reads what attention's norm gives.
        residual_scale: what is added is multiplied by it first.
        dropout: on what is added, in training.
    """

    attention: Attention
    mlp: FeedForward
    attention_norm: NormSpec | None = None
    mlp_norm: NormSpec | None = None
    attention_post_norm: NormSpec | None = None
    mlp_post_norm: NormSpec | None = None
    parallel_residual: bool = False
    one_norm: bool = False
    residual_scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        alone = self.attention_norm is not None and self.mlp_norm is None
        if self.one_norm and not (self.parallel_residual and alone):
            raise ValueError(
                "one_norm is of a parallel block with a norm in front of attention and none in "
                "front of the MLP"
            )

    @property
    def hidden_size(self) -> int:
        """Of the model."""
        return self.attention.hidden_size

    @property
    def norms(self) -> dict[str, NormSpec]:
        """Its norms over the hidden size by name."""
        found = {
            "attention_norm": self.attention_norm,
            "attention_post_norm": self.attention_post_norm,
            "mlp_norm": self.mlp_norm,
            "mlp_post_norm": self.mlp_post_norm,
        }
        return {name: norm for name, norm in found.items() if norm is not None}

    def parts(self, division: Division) -> dict[str, Part]:
        """All layers by name, in the order of the forward pass."""
        norms, found = self.norms, dict[str, Part]()

        def norm(name: str) -> None:
            if name in norms:
                found[name] = norms[name]

        norm("attention_norm")
        found |= {f"attention.{n}": part for n, part in self.attention.parts(division).items()}
        norm("attention_post_norm")
        norm("mlp_norm")
        found |= {f"mlp.{n}": part for n, part in self.mlp.parts(division).items()}
        norm("mlp_post_norm")
        return found

    def exchanges(self) -> tuple[Exchange, ...]:
        """What it sends, in the order of the forward pass."""
        return tuple(
            replace(exchange, layer=f"{place}.{exchange.layer}")
            for place, layer in (("attention", self.attention), ("mlp", self.mlp))
            for exchange in layer.exchanges()
        )

    def linears(self, division: Division, rank: int) -> tuple[Linear, ...]:
        """Its matmuls with weights on one rank."""
        return tuple(
            replace(linear, name=f"{place}.{linear.name}")
            for place, layer in (("attention", self.attention), ("mlp", self.mlp))
            for linear in layer.linears(division, rank)
        )
