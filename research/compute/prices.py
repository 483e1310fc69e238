"""What chip-hours cost, grids emit and data centres add: prices.toml, or a user's file like it."""

import dataclasses
import datetime
import difflib
import functools
import math
import pathlib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from research.compute import chips

STALE = datetime.timedelta(days=90)
"""Prices older than this are told to be so."""
AVERAGE = "average"
"""The PUE of a provider that has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Price:
    """Of an hour of one chip, on demand, by its provider's list, the host's share included."""

    chip: str
    """Its key in chips.toml."""
    provider: str
    region: str
    usd: float
    source: str
    date: datetime.date
    instance: str = ""
    """What is rented, and the chip's part of it."""

    @property
    def where(self) -> str:
        return f"{self.provider} {self.region}"

    def stale(self, today: datetime.date) -> str:
        """The line that warns of a price older than `STALE`; empty where it is not."""
        age = today - self.date
        if age <= STALE:
            return ""
        return (
            f"the price of {self.chip} at {self.where} is of {self.date}, "
            f"{age.days} days ago: a file of your own can replace it"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    kg_per_kwh: float
    """Of CO2-equivalent."""
    source: str
    date: datetime.date


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pue:
    ratio: float
    """Energy of a data centre over that of its machines; 1 or more."""
    source: str
    date: datetime.date


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    prices: tuple[Price, ...]
    grids: Mapping[str, Grid] = dataclasses.field(hash=False)
    pues: Mapping[str, Pue] = dataclasses.field(hash=False)

    def of(self, chip: str, provider: str | None = None) -> Price | None:
        """The cheapest of a chip, of one provider where one is named; None where there is none."""
        found = [
            p
            for p in self.prices
            if p.chip == chip and (provider is None or p.provider == provider)
        ]
        return min(found, key=lambda p: p.usd, default=None)

    def grid(self, name: str) -> Grid:
        """Raises ValueError for one that is not there."""
        if name not in self.grids:
            raise ValueError(f"no grid {name!r} among the prices{_nearest(name, self.grids)}")
        return self.grids[name]

    def pue(self, provider: str | None) -> tuple[str, Pue]:
        """Of a provider, or the average of data centres."""
        name = provider if provider is not None and provider in self.pues else AVERAGE
        return name, self.pues[name]


@functools.cache
def published() -> Prices:
    """Those of prices.toml."""
    return _read(pathlib.Path(__file__).with_name("prices.toml"))


def load(path: str | pathlib.Path) -> Prices:
    """The published ones, and a user's file over them: it replaces all prices of the chips that
    it names, and grids and PUEs by name.

    Raises ValueError, in one line, for a file that is absent or not of the form of prices.toml.
    """
    own, base = _read(pathlib.Path(path)), published()
    named = {price.chip for price in own.prices}
    kept = tuple(price for price in base.prices if price.chip not in named)
    return Prices(
        prices=kept + own.prices,
        grids={**base.grids, **own.grids},
        pues={**base.pues, **own.pues},
    )


def _read(path: pathlib.Path) -> Prices:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read prices from {path}: {error.strerror}") from None
    except ValueError as error:  # of TOML, and of UTF-8
        raise ValueError(f"{path} is not TOML: {' '.join(str(error).split())}") from None
    _fields(found, {"price": list, "grid": dict, "pue": dict}, (), str(path))
    return Prices(
        prices=tuple(
            _price(row, f"{path}: price {n}") for n, row in enumerate(found.get("price", []), 1)
        ),
        grids={
            name: Grid(**_dated(row, "kg_per_kwh", 0, f"{path}: grid {name}"))
            for name, row in found.get("grid", {}).items()
        },
        pues={
            name: Pue(**_dated(row, "ratio", 1, f"{path}: pue {name}"))
            for name, row in found.get("pue", {}).items()
        },
    )


def _price(row: Any, where: str) -> Price:
    texts = {"chip": str, "provider": str, "region": str}
    given = _dated(row, "usd", 0, where, texts, {"instance": str})
    if given["chip"] not in chips.chips():
        near = _nearest(given["chip"], chips.chips())
        raise ValueError(f"{where}: no chip {given['chip']!r} in chips.toml{near}")
    return Price(**given)


def _dated(
    row: Any,
    figure: str,
    least: float,
    where: str,
    texts: Mapping[str, type] | None = None,
    optional: Mapping[str, type] | None = None,
) -> dict[str, Any]:
    """A row's fields, checked: one figure of `least` or more, its source and its date."""
    needed = {**(texts or {}), figure: (int, float), "source": str, "date": object}
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a table, not {row!r}")
    _fields(row, {**needed, **(optional or {})}, needed, where)
    value = row[figure]
    if isinstance(value, bool) or not (math.isfinite(value) and value >= least):
        raise ValueError(f"{where}: {figure} must be a number of {least} or more, not {value}")
    return {**row, figure: float(value), "date": _date(row["date"], where)}


def _date(value: Any, where: str) -> datetime.date:
    try:
        found = value if type(value) is datetime.date else datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: date must be a day, YYYY-MM-DD, not {value!r}") from None
    if found > datetime.date.today():
        raise ValueError(f"{where}: date {found} is in the future")
    return found


def _fields(
    row: Mapping[str, Any], known: Mapping[str, Any], needed: Iterable[str], where: str
) -> None:
    for name in needed:
        if name not in row:
            raise ValueError(f"{where}: {name} is missing")
    for name, value in row.items():
        if name not in known:
            raise ValueError(f"{where}: no field {name!r}{_nearest(name, known)}")
        if not isinstance(value, known[name]):
            kinds = {str: "a text", list: "tables [[price]]", dict: "tables"}
            kind = kinds.get(known[name], "a number")
            raise ValueError(f"{where}: {name} must be {kind}, not {value!r}")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
