"""The names of plans' styles: transformers' own where it has one. No torch.

=================================  ==============================================================
style                              what a rank holds
=================================  ==============================================================
``colwise``                        some output features; the input is whole
``packed_colwise``                 the same of several blocks side by side (gate and up; Q, K, V)
``colwise_gather_output``          the same; the result is gathered where a caller asks for it
``rowwise``                        some input features; the results are summed
``packed_rowwise``                 the same of several blocks side by side
``rowwise_split_input``            the same
``embedding_rowwise``              a range of the vocabulary
``embedding_colwise``              some features of every vector
``split_parameter``                its part of a parameter that is used directly (a head's scale)
``gathered_parameter``             its part of a parameter that is whole while it is used
``moe_tp_experts``                 a part of every expert; the results are summed
``replicated_with_grad_allreduce`` everything, and of its gradient a part: the sum is made
``copy_output``                    everything; the gradient of the result is summed
``replicate``                      everything
=================================  ==============================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

COLUMN = frozenset({"colwise", "packed_colwise", "colwise_gather_output", "colwise_rep"})
ROW = frozenset({"rowwise", "packed_rowwise", "rowwise_split_input", "rowwise_rep"})
TABLE = frozenset({"embedding_rowwise", "embedding_colwise"})
EXPERTS = frozenset({"moe_tp_experts"})
PARAMETER = frozenset({"split_parameter", "gathered_parameter"})
WHOLE = frozenset(
    {
        "replicate",
        "replicated_with_grad_allreduce",
        "copy_output",
        # What transformers does around parameters that others of its styles split; here it follows
        # from the split itself.
        "mla_kv_a_proj",
        "all_reduce",
        "moe_identity_expert",
        "local_params",
    }
)

SPLIT = COLUMN | ROW | TABLE | EXPERTS | PARAMETER
STYLES = SPLIT | WHOLE

# Known, and refused: they belong to other kinds of parallelism.
OTHERS = {
    "grouped_gemm": "expert parallelism",
    "ep_router": "expert parallelism",
    "ep_dispatch_experts": "expert parallelism",
    "sequence_parallel": "sequence parallelism, which is an argument of colrow.parallelize",
}


def check_styles(plan: Mapping[str, str]) -> None:
    """Raises ValueError for a style that is not known, naming it and those that are."""
    for pattern, style in plan.items():
        if style in OTHERS:
            raise ValueError(f"{pattern}: {style!r} is a style of {OTHERS[style]}")
        if style not in STYLES:
            raise ValueError(
                f"{pattern}: unknown style {style!r}; known are {', '.join(sorted(STYLES))}"
            )


def pattern_of(name: str) -> str:
    """A module's name with ``*`` for every number between dots."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class Matcher:
    """Finds the style of a module or parameter in a plan.

    A pattern is a whole name, or its end after a dot, with ``*`` for a number: transformers' plans
    name modules from the base model on.
    """

    def __init__(self, plan: Mapping[str, str]) -> None:
        self._rules = [(_compiled(pattern), pattern, style) for pattern, style in plan.items()]

    def style(self, name: str) -> str | None:
        """The style of the longest pattern that matches."""
        hits = [(len(p), style) for rule, p, style in self._rules if rule.fullmatch(name)]
        return max(hits)[1] if hits else None

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The patterns that match none of these names."""
        known = list(names)
        return [p for rule, p, _ in self._rules if not any(rule.fullmatch(n) for n in known)]


def _compiled(pattern: str) -> re.Pattern[str]:
    parts = [r"\d+" if part == "*" else re.escape(part) for part in pattern.split(".")]
    return re.compile(r"(?:.*\.)?" + r"\.".join(parts))
