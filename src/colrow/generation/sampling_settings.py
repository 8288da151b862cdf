"""How the next token is chosen. Plain Python, no torch: the command line checks it first."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SMALLEST_TEMPERATURE = 1e-4  # below, dividing fp32 logits by it can overflow


@dataclass(frozen=True)
class Sampling:
    """Greedy, or a draw from the softmax of the logits, filtered as transformers filters.

    Attributes:
        temperature: 0 takes the most likely token; otherwise the logits are divided by it.
        top_k: only the k most likely tokens may be drawn, and those that tie with the k-th; 0 for
            all (Fan et al. 2018).
        top_p: only the fewest most likely tokens whose probabilities, renormalised after top_k,
            reach top_p together; at least one. 1 for all (Holtzman et al. 2020).
        seed: of the draws. The same seed draws the same tokens at every tensor-parallel size.

    Raises:
        ValueError: for a value outside its range, or a filter that greedy choice would ignore.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        valid = self.temperature == 0 or _SMALLEST_TEMPERATURE <= self.temperature < math.inf
        if not valid:
            raise ValueError(
                f"temperature={self.temperature:g}: should be 0 for greedy choice, or at least "
                f"{_SMALLEST_TEMPERATURE:g}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: should be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p:g}: should be above 0 and at most 1")
        if self.greedy and self.filters:
            raise ValueError(
                "top_k and top_p choose among likely tokens, but temperature=0 always takes the "
                "most likely one: set a temperature, such as 0.7"
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether some tokens may not be drawn."""
        return self.top_k > 0 or self.top_p < 1
