"""Money and energy."""

from __future__ import annotations

import pytest

from colrow.planner.cost import cost


def test_costs_are_device_hours_times_price_and_power() -> None:
    """8 devices at 10,000 tokens/s: 100 s, 0.2222 device hours for a million tokens."""
    found = cost(8, 1e4, price_per_hour=2.0, watts=700, tokens=3.6e9)
    assert found.dollars_per_million_tokens == pytest.approx(0.4444, rel=1e-3)
    assert found.kilowatt_hours_per_million_tokens == pytest.approx(0.15556, rel=1e-3)
    assert found.hours == pytest.approx(100) and found.dollars == pytest.approx(1600)
    assert found.kilowatt_hours == pytest.approx(560)


def test_what_is_not_known_is_not_made_up() -> None:
    found = cost(1, 10.0)
    assert found.dollars_per_million_tokens is None
    assert found.kilowatt_hours_per_million_tokens is None and found.hours is None
    for name in ("price_per_hour", "tokens"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name}=.* must be a positive"):
                cost(1, 10.0, **{name: value})  # type: ignore[arg-type]
