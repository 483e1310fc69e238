"""Predicted times against arithmetic by hand, and calibrations against what they were made of."""

import dataclasses
import importlib.metadata
import json
import math
from collections import Counter

import jax
import numpy as np
import pytest
from scipy.optimize import nnls

from research.bench import calibrate, commands
from research.compute import chips, peaks, predict, roofline
from research.compute.links import Collective
from research.compute.program import Kernel, Memory, Product, Program

H100 = roofline.of_chip(chips.chips()["h100-sxm"])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ERGON_CACHE", str(tmp_path / "cache"))


def some(**changes):
    """Peaks of this CPU, not measured."""
    device = jax.local_devices()[0]
    found = peaks.Peaks(
        device=peaks.name_of(device),
        platform="cpu",
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        date="2026-01-02",
        matmul={"float32": 1e11, "bfloat16": 2e11},
        bandwidth=((2**20, 1e11), (2**28, 1e10)),
    )
    return dataclasses.replace(found, **changes)


RATES = roofline.of_peaks(some())


def made(*kernels, collectives=()):
    """A program of kernels and how often each runs."""
    found = Counter(dict(kernels))
    return Program(
        kernels=found,
        products=Counter(
            {Product("", k.kind, k.dtype): k.flops * n for k, n in found.items() if k.flops}
        ),
        moved=Counter({("", 0): sum(k.bytes * n for k, n in found.items())}),
        collectives=list(collectives),
    )


DOT = Kernel("dot", "float32", flops=2 * 10**9, bytes=10**6)
CONVOLUTION = Kernel("convolution", "bfloat16", flops=4 * 10**9, patches=10**5, bytes=10**6)
FUSION = Kernel("fusion", "", elementwise=10**7, singly=10**5, transcendentals=10**6, bytes=10**9)


def test_the_work_by_hand():
    found = predict.work(made((DOT, 3), (CONVOLUTION, 2), (FUSION, 5)), RATES)
    assert found["step"] == 1
    assert found["kernel"] == 10
    assert found["dot"] == pytest.approx(3 * 2e9 / 1e11)
    assert found["convolution"] == pytest.approx(2 * 4e9 / 2e11)
    assert found["memory"] == pytest.approx(5 * 1e6 / 1e11 + 5 * 1e9 / 1e10)
    assert found["loops"] == 0
    assert found["elementwise"] == pytest.approx(5 * 1e7 / 1e11)
    assert found["singly"] == pytest.approx(5 * 1e5 / 1e11)
    assert found["patches"] == pytest.approx(2 * 1e5 / 1e11)
    assert found["transcendental"] == pytest.approx(5 * 1e6 / 1e11)
    assert found["links"] == 0
    assert set(found) == set(predict.TERMS)


def test_bytes_outside_of_loops_come_from_all_that_the_program_holds():
    program = made((DOT, 3), (DOT._replace(looped=True), 4))
    assert predict.work(program, RATES)["memory"] == pytest.approx(3 * 1e6 / 1e11)
    program.memory = Memory(2**28, 0, 0, 0, 0)
    found = predict.work(program, RATES)
    assert found["memory"] == pytest.approx(3 * 1e6 / 1e10)
    assert found["loops"] == pytest.approx(4 * 1e6 / 1e11)


def test_messages_take_the_links():
    reduced = Collective("all-reduce", 8 * 10**9, 4, 3, ("data",))
    link = chips.chips()["h100-sxm"].interconnect_bandwidth / 2
    found = predict.work(made((DOT, 1), collectives=[reduced]), H100)
    assert found["links"] == pytest.approx(3 * 2 * 8e9 * 3 / 4 / link)
    with pytest.raises(ValueError, match="rate of links is not known of"):
        predict.work(made((DOT, 1), collectives=[reduced]), RATES)


def test_a_rate_that_is_not_known_is_told():
    odd = made((DOT._replace(dtype="complex64"), 1))
    with pytest.raises(ValueError, match="no peak for complex64 on"):
        predict.work(odd, RATES)
    with pytest.raises(ValueError, match="no peak is known of H100"):
        predict.predict(odd, H100)
    with pytest.raises(ValueError, match="no rate of links is known of"):
        predict.predict(made((DOT, 1), collectives=[Collective("all-reduce", 8, 2, 1)]), RATES)


# A device that was never timed.


def test_the_roofline_gives_an_interval():
    program = made((DOT, 100))
    program.compulsory = 10**9
    bounds = roofline.roofline(program, H100)
    found = predict.predict(program, H100)
    assert found.low == found.at_least == bounds.at_least
    assert found.seconds == pytest.approx(bounds.overlapped / 0.4 + 100 * 3.4e-6)
    assert found.high == pytest.approx(bounds.serial / 0.2 + 100 * 20e-6)
    assert found.low < found.seconds < found.high
    assert "estimated: not calibrated: 40% of the roofline of H100" in str(found)
    assert not found.parts


# Calibration.

TRUE = {"step": 2e-4, "kernel": 3e-6, "dot": 2.5, "memory": 1.2, "transcendental": 9.0}


def _fusion(elementwise, transcendentals):
    return Kernel(
        "fusion", "", elementwise=elementwise, transcendentals=transcendentals, bytes=10**6
    )


def programs(count=12, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size = rng.lognormal(0, 1.5, 6)
        kernels = [
            (Kernel("dot", "float32", flops=int(1e8 * size[0]), bytes=int(1e5 * size[1])), 5),
            (_fusion(int(1e6 * size[2]), int(1e6 * size[3])), 40),
            (Kernel("copy", "", bytes=int(1e7 * size[4])), int(30 * size[5]) + 1),
        ]
        yield made(*kernels)


def timed(factors=TRUE, noise=0.0, count=12):
    rng = np.random.default_rng(1)
    return [
        (
            p,
            sum(predict.work(p, RATES)[n] * f for n, f in factors.items())
            * rng.lognormal(0, noise),
        )
        for p in programs(count)
    ]


def test_factors_are_found_again():
    found = predict.calibrate(timed(), some())
    for name, factor in found.factors.items():
        assert factor == pytest.approx(TRUE.get(name, 0), rel=1e-6, abs=1e-9)
    assert found.ratios == pytest.approx([1.0] * 12)
    assert found.error < 1e-6
    (unseen, seconds), *_ = reversed(timed(count=20))
    guess = predict.predict(unseen, RATES, found)
    assert guess.seconds == pytest.approx(seconds)
    assert sum(guess.parts.values()) == pytest.approx(seconds)
    assert guess.parts["dot"] == pytest.approx(2.5 * predict.work(unseen, RATES)["dot"])


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_fit_is_the_non_negative_one_with_least_relative_errors(noise):
    steps = timed(noise=noise)
    terms = np.array([[predict.work(p, RATES)[n] for n in predict.TERMS] for p, _ in steps])
    relative = terms / np.array([[s] for _, s in steps])
    scale = relative.max(0) + 1e-300
    expected, _ = nnls(relative / scale, np.ones(len(steps)))
    found = predict.calibrate(steps, some()).factors
    assert list(found.values()) == pytest.approx(expected / scale * (relative.max(0) > 0), rel=1e-6)
    assert all(factor >= 0 for factor in found.values())


def test_a_programs_ratio_is_by_the_others_alone():
    steps = timed(noise=0.2)
    before = predict.calibrate(steps, some()).ratios
    steps[3] = steps[3][0], 10 * steps[3][1]
    after = predict.calibrate(steps, some()).ratios
    assert after[3] == pytest.approx(10 * before[3])
    assert after[4] != pytest.approx(before[4])


def test_the_band_holds_nine_in_ten_and_never_less_than_the_bound():
    steps = timed(noise=0.3, count=30)
    found = predict.calibrate(steps, some())
    low, high = found.band
    assert sum(low <= ratio <= high for ratio in found.ratios) == 28
    assert 0 < low < 1 < high
    quick = dataclasses.replace(found, factors=dict.fromkeys(predict.TERMS, 1e-9))
    guess = predict.predict(made((DOT, 1)), RATES, quick)
    assert guess.low == guess.seconds == guess.high == guess.at_least == pytest.approx(2e9 / 1e11)


def test_a_calibration_needs_programs():
    with pytest.raises(ValueError, match="two programs or more"):
        predict.calibrate(timed(count=1), some())


# Kept.


def test_it_is_kept_beside_the_peaks():
    assert predict.load() is None
    found = predict.calibrate(timed(noise=0.1), some(), "2026-02-03")
    path = predict.save(found)
    assert path.parent == peaks.save(some()).parent
    assert predict.load() == found
    assert predict.from_json(json.loads(json.dumps(predict.to_json(found)))) == found
    predict.save(dataclasses.replace(found, peaks=some(device="another")))
    assert predict.load() == found


@pytest.mark.parametrize(
    "changes",
    [
        {"factors": {}},
        {"factors": {**dict.fromkeys(predict.TERMS, 1.0), "dot": -1}},
        {"factors": {**dict.fromkeys(predict.TERMS, 1.0), "dot": math.nan}},
        {"ratios": []},
        {"ratios": [0.0]},
        {"peaks": None},
        {"date": "soon"},
    ],
    ids=str,
)
def test_a_broken_file_is_none(changes):
    found = predict.calibrate(timed(), some())
    path = predict.save(found)
    path.write_text(json.dumps({**predict.to_json(found), **changes}))
    assert predict.load() is None
    path.write_text("{")
    assert predict.load() is None


# The measurement.


def test_no_program_to_calibrate_on_is_a_configs():
    configs = [make() for make in calibrate.configs().values()]
    mine = [make() for make in calibrate.others().values()]
    for e in mine:
        assert not any((e.model, e.batch_size) == (c.model, c.batch_size) for c in configs)


def test_the_command_times_and_keeps(monkeypatch, capsys, tmp_path):
    sizes = {f"mlp {n}": ("mlp_cancer", {"model": {"sizes": (n, 1)}}, 8) for n in (8, 16, 32)}
    monkeypatch.setattr(calibrate, "OTHERS", sizes)
    monkeypatch.setattr(calibrate, "configs", lambda: {"mlp": calibrate.others()["mlp 16"]})
    peaks.save(some())
    out = tmp_path / "out.json"
    commands.the_calibration(["--seconds", "0.05", "--rounds", "2", "--json", str(out)])
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    (row,) = found["configs, by a calibration on other programs"]
    assert row["measured"] > 0
    assert row["predicted"] == pytest.approx(sum(row["parts"].values()))
    assert f"{1e3 * row['measured']:10.4g}" in text
    assert "median error" in text
    kept = predict.load()
    assert kept == predict.from_json(found["calibration"])
    assert len(kept.ratios) == 4
    assert text.splitlines()[-1].startswith("kept in ")


def test_a_mistake_is_one_line(capsys):
    peaks.save(some())
    with pytest.raises(SystemExit) as error:
        commands.the_calibration(["--seconds", "0"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "error: steps are timed in a round or more, not 3 of 0.0 seconds\n"
    )
