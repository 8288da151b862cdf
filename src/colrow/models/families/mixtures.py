"""What families with a mixture of experts have in common. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colrow.files import shown
from colrow.models.config_limits import check_number, check_whole
from colrow.models.families.family import Family

Names = Mapping[str, tuple[str, ...]]
_LOSS, _COEFFICIENT = "output_router_logits", "router_aux_loss_coef"
ROUTER_LOSS_KEYS = frozenset({_LOSS, _COEFFICIENT})
"""Keys that :class:`Mixture` reads and writes, of families whose models have that loss."""


def with_experts(
    names: Names, router: str, up: tuple[str, ...], down: str, *, dense: bool
) -> dict[str, tuple[str, ...]]:
    """The names of a family with those of experts.

    Args:
        dense: some layers have an MLP, whose names stay.
    """
    mlp = () if dense else ("blocks.{i}.mlp.up", "blocks.{i}.mlp.down")
    return {name: files for name, files in names.items() if name not in mlp} | {
        "blocks.{i}.mlp.router": (router,),
        "blocks.{i}.mlp.experts.up": up,
        "blocks.{i}.mlp.experts.down": (down,),
    }


def gguf_with_experts(names: Names, *, dense: bool) -> dict[str, tuple[str, ...]]:
    """The same of llama.cpp's files, whose tensors hold all experts."""
    exps = "blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"
    return with_experts(names, "blk.{i}.ffn_gate_inp", exps, "blk.{i}.ffn_down_exps", dense=dense)


@dataclass(frozen=True)
class Mixture(Family):
    """A family with experts, and the loss that balances them where the keys say so."""

    def complete(self, fields: dict[str, Any], values: Mapping[str, Any]) -> None:
        """Refuses a configuration without experts, and reads the coefficient of the loss."""
        super().complete(fields, values)
        for field in ("experts", "active_experts"):
            check_whole(self.keys[field], fields.get(field), 1, 1 << 14)
        if _LOSS not in self.reads:
            return
        used = values.get(_LOSS, False)
        if not isinstance(used, bool):
            raise ValueError(f"{_LOSS}={shown(used)}: must be true or false")
        if used:
            coefficient = values.get(_COEFFICIENT, self.defaults.get(_COEFFICIENT))
            check_number(_COEFFICIENT, coefficient)
            fields["router_balance"] = float(coefficient)

    def spell(self, values: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Writes the loss where there is one."""
        super().spell(values, fields)
        if _LOSS in self.reads and fields["router_balance"]:
            values |= {_LOSS: True, _COEFFICIENT: fields["router_balance"]}
