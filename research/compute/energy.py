"""What a run costs: hours, chip-hours, energy, emissions and money, each with how it was got."""

import dataclasses
import datetime
import math

from research.compute.chips import Chip, chips
from research.compute.prices import Prices, Pue, published

JOULES = 3.6e6
"""In a kWh."""


@dataclasses.dataclass(frozen=True)
class Amount:
    """A figure and how it was got; or none, and why."""

    value: float | None
    unit: str
    qualifier: str
    """exact, upper bound, estimated, measured or unavailable."""
    basis: str = ""
    """What it was computed from; why it is unavailable."""

    def __str__(self) -> str:
        because = f": {self.basis}" if self.basis else ""
        if self.value is None:
            return f"{self.qualifier}{because}"
        return f"{self.value:,.4g} {self.unit}, {self.qualifier}{because}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run. Energy is of the accelerators and what their data centre adds to it, in use and
    idle; hosts and networks are not in it."""

    hours: Amount
    chip_hours: Amount
    chip_energy: Amount
    """kWh of the accelerators."""
    energy: Amount
    """kWh of the data centre for them."""
    emissions: Amount
    """kg of CO2-equivalent of the electricity; nothing of the making of the hardware."""
    money: Amount
    """USD at the list price, chips rented for just so long."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            f"{field.name.replace('_', '-'):12} {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name != "warnings"
        ]
        return "\n".join(rows + [f"warning: {line}" for line in self.warnings])


def whole_chips(chip: Chip, devices: int) -> int:
    """Chips that have so many JAX devices on them, the last one perhaps in part."""
    return math.ceil(devices / chip.devices_per_chip)


def cost(
    chip: str,
    count: int,
    seconds: float,
    *,
    prices: Prices | None = None,
    provider: str | None = None,
    grid: str = "world",
    measured: bool = False,
    joules: float | None = None,
    today: datetime.date | None = None,
) -> Cost:
    """Of `count` chips for so many seconds.

    chip: its key in chips.toml; count: of chips, `whole_chips` of devices. prices: default, those
    of prices.toml. provider: whose price and PUE; default, the cheapest that there is. measured:
    whether `seconds` were. joules: what all the chips were measured to take; else they are taken
    to draw their board power throughout, which a busy one does not exceed. today: default, today.

    Raises ValueError for a chip, a grid or a provider that is not there, and for a count, seconds
    or joules that cannot be.
    """
    prices = prices or published()
    if chip not in chips():
        raise ValueError(f"no chip {chip!r} in chips.toml")
    if count < 1:
        raise ValueError(f"a run takes 1 chip or more, not {count}")
    for name, value in {"seconds": seconds, "joules": joules}.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be 0 or more, not {value}")
    _known(provider, prices)
    kind = "measured" if measured else "estimated"
    hours = seconds / 3600
    chip_hours = Amount(hours * count, "chip-hours", kind, f"{count:,} {chips()[chip].name}")
    chip_energy = _chip_energy(chips()[chip], chip_hours, joules)
    price = prices.of(chip, provider)
    energy = _facility(chip_energy, *prices.pue(price.provider if price else provider))
    factor = prices.grid(grid)
    emissions = _of(
        energy, factor.kg_per_kwh, "kg CO2e", f"{factor.kg_per_kwh:g} kg a kWh, grid {grid!r}"
    )
    money, stale = _unpriced(chip, provider), ""
    if price:
        basis = f"{price.usd:g} USD a chip-hour, {price.where}, {price.date}"
        money, stale = _of(chip_hours, price.usd, "USD", basis), price.stale(today or _today())
    return Cost(
        hours=Amount(hours, "hours", kind),
        chip_hours=chip_hours,
        chip_energy=chip_energy,
        energy=energy,
        emissions=emissions,
        money=money,
        warnings=(stale,) if stale else (),
    )


def _known(provider: str | None, prices: Prices) -> None:
    names = dict.fromkeys(price.provider for price in prices.prices)
    if provider is not None and provider not in names | dict.fromkeys(prices.pues):
        raise ValueError(f"no provider {provider!r} among the prices; there are {', '.join(names)}")


def _chip_energy(chip: Chip, chip_hours: Amount, joules: float | None) -> Amount:
    if joules is not None:
        return Amount(joules / JOULES, "kWh", "measured", "of the accelerators")
    if chip.power_watts is None:
        reason = f"no board power of {chip.name} is published, and its energy was not measured"
        return Amount(None, "kWh", "unavailable", reason)
    watts = chip.power_watts * chip.devices_per_chip
    return _of(chip_hours, watts / 1000, "kWh", f"board power, {watts:g} W a chip, throughout")


def _facility(chip_energy: Amount, name: str, pue: Pue) -> Amount:
    return _of(chip_energy, pue.ratio, "kWh", f"PUE {pue.ratio:g}, {name}")


def _of(amount: Amount, factor: float, unit: str, basis: str) -> Amount:
    """`amount` times a published factor: an estimate, whatever the amount is."""
    if amount.value is None:
        return dataclasses.replace(amount, unit=unit)
    return Amount(amount.value * factor, unit, "estimated", basis)


def _unpriced(chip: str, provider: str | None) -> Amount:
    at = f" at {provider}" if provider else ""
    return Amount(None, "USD", "unavailable", f"no list price of {chip}{at} is in the prices")


def _today() -> datetime.date:
    return datetime.date.today()
