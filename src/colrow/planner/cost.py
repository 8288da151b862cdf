"""What a plan costs in money and energy. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of a number of devices that process tokens at some speed.

    Attributes:
        dollars_per_million_tokens: in whatever currency the price was given; None without a price.
        kilowatt_hours_per_million_tokens: of the devices at full load; None where that is unknown.
        hours, dollars, kilowatt_hours: of the whole run, when its number of tokens is known.
    """

    dollars_per_million_tokens: float | None
    kilowatt_hours_per_million_tokens: float | None
    hours: float | None = None
    dollars: float | None = None
    kilowatt_hours: float | None = None


def cost(
    devices: int,
    tokens_per_second: float,
    *,
    price_per_hour: float | None = None,
    watts: float = 0.0,
    tokens: float | None = None,
) -> Cost:
    """What ``devices`` devices cost that together process so many tokens per second.

    Args:
        price_per_hour: of one device.
        watts: of one device; 0 where unknown. Cooling, hosts and network are not in it.
        tokens: of the whole run.

    Raises:
        ValueError: when the price, the power or the number of tokens is not positive.
    """
    for name, value in (("price_per_hour", price_per_hour), ("tokens", tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}: must be a positive number")
    if not 0 <= watts < float("inf"):
        raise ValueError(f"watts={watts}: must be a positive number")
    device_hours = devices * 1e6 / tokens_per_second / 3600
    money = None if price_per_hour is None else device_hours * price_per_hour
    energy = device_hours * watts / 1e3 if watts else None
    if tokens is None:
        return Cost(money, energy)
    millions = tokens / 1e6
    return Cost(
        money,
        energy,
        hours=tokens / tokens_per_second / 3600,
        dollars=None if money is None else money * millions,
        kilowatt_hours=None if energy is None else energy * millions,
    )
