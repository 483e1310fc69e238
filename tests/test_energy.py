"""What a run costs against arithmetic by hand; prices as published, and a user's own."""

import dataclasses
import datetime

import pytest

from research.compute import chips, energy, prices

DAY = datetime.date(2026, 11, 27)
HOUR = 3600.0
PUBLISHED = prices.published()


def own(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


PRICE = """
[[price]]
chip = "h100-sxm"
provider = "Ours"
region = "cellar"
usd = 2.5
source = "an invoice"
date = 2026-11-01
"""


def test_by_hand():
    found = energy.cost("h100-sxm", 8, 36 * HOUR, provider="AWS", grid="france", today=DAY)
    kwh = 8 * 36 * 0.7
    assert found.hours.value == 36
    assert found.chip_hours.value == 288
    assert found.chip_energy.value == pytest.approx(kwh)
    assert found.energy.value == pytest.approx(kwh * 1.14)
    assert found.emissions.value == pytest.approx(kwh * 1.14 * 0.056039)
    assert found.money.value == pytest.approx(288 * 6.88)
    assert found.warnings == ()
    amounts = [getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "warnings"]
    assert {amount.qualifier for amount in amounts} == {"estimated"}
    assert all(amount.qualifier in str(amount) for amount in amounts)
    assert "700 W a chip" in str(found.chip_energy)
    assert "PUE 1.14, AWS" in str(found.energy)


def test_the_cheapest_provider_and_its_data_centre():
    found = energy.cost("a100-sxm4-40gb", 1, HOUR, today=DAY)
    assert found.money.value == 1.99
    assert "Lambda" in found.money.basis
    assert found.energy.value == pytest.approx(0.4 * 1.54)
    assert "average" in found.energy.basis


def test_what_was_measured_is_said_to_be():
    found = energy.cost("h100-sxm", 2, HOUR, measured=True, joules=3.6e6, today=DAY)
    assert (found.hours.qualifier, found.chip_hours.qualifier) == ("measured", "measured")
    assert (found.chip_energy.value, found.chip_energy.qualifier) == (1.0, "measured")
    assert (found.energy.value, found.energy.qualifier) == (pytest.approx(1.54), "estimated")
    assert found.emissions.qualifier == "estimated"


def test_a_chip_of_two_devices_is_one_chip():
    mi250x = chips.chips()["mi250x"]
    assert [energy.whole_chips(mi250x, n) for n in (1, 2, 3)] == [1, 1, 2]
    assert energy.cost("mi250x", 1, HOUR).chip_energy.value == pytest.approx(0.560)


def test_no_power_and_no_price_are_told():
    found = energy.cost("tpu-v4", 4, HOUR, today=DAY)
    for amount in (found.chip_energy, found.energy, found.emissions):
        assert amount.value is None
        assert str(amount).startswith("unavailable: no board power of TPU v4 is published")
    assert str(found.money) == "unavailable: no list price of tpu-v4 is in the prices"
    assert energy.cost("tpu-v4", 4, HOUR, joules=7.2e6).energy.value == pytest.approx(2 * 1.54)
    nowhere = energy.cost("h200-sxm", 1, HOUR, provider="AWS")
    assert str(nowhere.money) == "unavailable: no list price of h200-sxm at AWS is in the prices"


@pytest.mark.parametrize(("days", "warned"), [(90, False), (91, True)])
def test_a_price_beyond_90_days_warns(days, warned):
    price = PUBLISHED.of("h100-sxm", "AWS")
    later = price.date + datetime.timedelta(days=days)
    found = energy.cost("h100-sxm", 1, HOUR, provider="AWS", today=later)
    assert bool(found.warnings) is warned
    assert ("warning: " in str(found)) is warned
    assert all("\n" not in line and str(price.date) in line for line in found.warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h101-sxm", 1, 1.0, {}), "no chip 'h101-sxm'"),
        (("h100-sxm", 0, 1.0, {}), "1 chip or more, not 0"),
        (("h100-sxm", 1, -1.0, {}), "seconds must be 0 or more, not -1.0"),
        (("h100-sxm", 1, float("nan"), {}), "seconds must be 0 or more, not nan"),
        (("h100-sxm", 1, 1.0, {"joules": float("inf")}), "joules must be 0 or more, not inf"),
        (("h100-sxm", 1, 1.0, {"grid": "germny"}), "no grid 'germny'.*did you mean 'germany'"),
        (("h100-sxm", 1, 1.0, {"provider": "Asure"}), "no provider 'Asure'.*Azure"),
    ],
)
def test_refused(arguments, message):
    *given, options = arguments
    with pytest.raises(ValueError, match=message) as error:
        energy.cost(*given, **options)
    assert "\n" not in str(error.value)


# The table.


def test_every_row_names_a_chip_a_source_and_a_past_day():
    assert len(PUBLISHED.prices) > 20
    for price in PUBLISHED.prices:
        assert price.chip in chips.chips()
        assert 0.1 < price.usd < 20
        assert price.region
        assert price.instance
    for row in [*PUBLISHED.prices, *PUBLISHED.grids.values(), *PUBLISHED.pues.values()]:
        assert "http" in row.source or "DigitalOcean" in row.source
        assert datetime.date(2023, 1, 1) < row.date <= datetime.date.today()
    assert all(1 < pue.ratio < 2 for pue in PUBLISHED.pues.values())
    assert all(0 < grid.kg_per_kwh < 1 for grid in PUBLISHED.grids.values())


def test_a_chip_has_one_price_at_a_provider():
    places = [(price.chip, price.provider, price.region) for price in PUBLISHED.prices]
    assert len(places) == len(set(places))


def test_ones_own_file_replaces_a_chips_prices(tmp_path):
    text = PRICE + "[grid.roof]\nkg_per_kwh = 0.02\nsource = 'x'\ndate = '2026-01-01'\n"
    text += "[pue.Ours]\nratio = 1.3\nsource = 'x'\ndate = '2026-01-01'\n"
    mine = prices.load(own(tmp_path, text))
    found = energy.cost("h100-sxm", 1, HOUR, prices=mine, grid="roof", today=DAY)
    assert found.money.value == 2.5
    assert found.energy.value == pytest.approx(0.7 * 1.3)
    assert found.emissions.value == pytest.approx(0.7 * 1.3 * 0.02)
    assert mine.of("h100-sxm", "AWS") is None
    assert mine.of("b200") == PUBLISHED.of("b200")
    assert mine.grid("france") == PUBLISHED.grid("france")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("h100-sxm", "h100-sxn", "price 1: no chip 'h100-sxn' in chips.toml; did you mean 'h100-s"),
        ("2.5", "-2.5", "price 1: usd must be a number of 0 or more, not -2.5"),
        ("2.5", "nan", "price 1: usd must be a number of 0 or more, not nan"),
        ("2.5", "true", "price 1: usd must be a number of 0 or more, not True"),
        ("2.5", "'2.5'", "price 1: usd must be a number, not '2.5'"),
        ("2026-11-01", "'soon'", "price 1: date must be a day, YYYY-MM-DD, not 'soon'"),
        ("2026-11-01", "2026-11-01T08:00:00", "price 1: date must be a day"),
        ("2026-11-01", "3", "price 1: date must be a day, YYYY-MM-DD, not 3"),
        ("2026-11-01", "2999-01-01", "price 1: date 2999-01-01 is in the future"),
        ('source = "an invoice"', "", "price 1: source is missing"),
        ("usd = 2.5", "usd = 2.5\neur = 2", "price 1: no field 'eur'"),
        ("[[price]]", "[price]", r"price must be tables \[\[price\]\], not"),
        ("[[price]]", "[[prices]]", "no field 'prices'; did you mean 'price'"),
        ("usd = 2.5", "usd = ", "is not TOML"),
    ],
)
def test_a_mistake_in_it_is_one_line(tmp_path, old, new, message):
    assert old in PRICE
    path = own(tmp_path, PRICE.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        prices.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_other_mistakes_in_it(tmp_path):
    row = "source = 'x'\ndate = '2026-01-01'\n"
    for text, message in {
        f"[grid.roof]\nkg_per_kwh = -1\n{row}": "grid roof: kg_per_kwh must be a number of 0",
        f"[pue.Ours]\nratio = 0.9\n{row}": "pue Ours: ratio must be a number of 1 or more",
        "grid = {roof = 3}\n": "grid roof: must be a table, not 3",
        "price = [3]\n": "price 1: must be a table, not 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            prices.load(own(tmp_path, text))
    with pytest.raises(ValueError, match=r"cannot read prices from .*absent"):
        prices.load(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not TOML"):
        prices.load(tmp_path / "latin.toml")
