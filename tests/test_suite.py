"""The suite: real families measured for moments, and machines too noisy to report."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import time

import jax
import numpy as np
import pytest

from research import compute
from research.bench import commands, counters, families, loop, measuring, others, suite, words
from research.bench import result as results
from research.bench.families import FAMILIES
from research.compute import energy, peaks, roofline
from research.data.bundled import PythonReference
from research.experiment import Target
from research.setup import prepare

CPU = jax.local_devices()[0]
SHORT = dataclasses.replace(
    FAMILIES["mlp"],
    steps=50,
    target=Target(metric="accuracy", value=0.6, split="validation"),
)
PEAKS = peaks.Peaks(
    device=peaks.name_of(CPU),
    platform="cpu",
    versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    date="2026-01-02",
    matmul={"float32": 4.5e11},
    bandwidth=((2**18, 3e11), (2**28, 5e10)),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The MLP, measured for a moment on a machine that cannot be too noisy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERGON_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measuring, "NOISE", 1e9)
        patch.setattr(measuring, "OTHERS", 1.0)
        patch.setattr(measuring, "WARM", 0.0)
        patch.setattr(measuring, "RUN", 0.0)
        patch.setattr(counters, "find", lambda device: (None, "none is looked for"))
        peaks.save(PEAKS)
        return suite.measure({"mlp": SHORT}, 0.05, price=36.0)


def test_what_is_measured_is_a_file_that_is_read(measured):
    data = json.loads(json.dumps(results.to_json(measured), allow_nan=False))
    assert results.from_json(data) == measured
    assert measured.peaks == PEAKS
    (roof,) = measured.roofs
    assert (roof.flops, roof.bandwidth) == (4.5e11, 5e10)


def test_figures_belong_together(measured):
    (row,) = measured.rows
    assert not row.failed
    f = {name: figure.value for name, figure in row.figures.items()}
    setup = prepare(SHORT.experiment(), [CPU])
    cost = compute.count(setup.step().trace(*setup.abstract_example()))
    assert (f["model_flops"], row.figures["model_flops"].qualifier) == (cost.model_flops, "exact")
    assert f["parameters"] == setup.parameters
    assert row.data == setup.fingerprint
    assert f["step_seconds"] == pytest.approx(np.median(row.rounds))
    assert f["examples_per_second"] * f["step_seconds"] == pytest.approx(setup.batch_size)
    share = roofline.utilization(
        {"float32": cost.model_flops}, f["step_seconds"], 1, roofline.of_peaks(PEAKS)
    )
    assert f["mfu_measured"] == pytest.approx(share.value)
    assert f["first_step_seconds"] > f["compile_seconds"]
    assert f["step_p95"] >= f["step_p50"]
    assert f["target_steps"] % SHORT.eval_every == 0
    assert f["target_reached"] >= 0.6
    assert f["target_money"] == pytest.approx(f["target_seconds"] * 36 / 3600)


def test_what_is_not_there_says_why(measured):
    (row,) = measured.rows
    found = {k: v.how for k, v in row.figures.items() if v.qualifier == "unavailable"}
    nothing = "none is looked for; and no board power is published for this device"
    assert found == {
        "mfu": f"no datasheet is known for {peaks.name_of(CPU)}",
        "hfu": f"no datasheet is known for {peaks.name_of(CPU)}",
        "mfu_causal": "no product is masked causally",
        "mfu_causal_measured": "no product is masked causally",
        "memory_peak": "cpu does not tell",
        "joules_per_step": nothing,
        "target_joules": nothing,
    }
    text = words.table(measured)
    assert f"\nmlp: joules_per_step, target_joules unavailable: {nothing}" in text


def bench(**changes):
    fields = {
        "device": CPU,
        "seconds": 0.02,
        "price": None,
        "datasheet": None,
        "measured": roofline.of_peaks(PEAKS),
        "counters": (None, "none"),
    }
    return measuring.Bench(**(fields | changes))


def test_a_machine_too_noisy_reports_no_time(monkeypatch):
    for name, value in {"NOISE": 0.0, "WARM": 0.0, "RUN": 0.0}.items():
        monkeypatch.setattr(measuring, name, value)
    unmet = Target(metric="accuracy", value=1.01, split="validation")
    row = bench().row("mlp", dataclasses.replace(SHORT, steps=25, target=unmet))
    for name in ("step_seconds", "step_p95", "examples_per_second", "mfu_measured"):
        assert row.figures[name].how.startswith("too noisy: the middle half of the rounds is ")
    assert row.figures["spread"].value > 0
    assert row.rounds
    assert "accuracy >= 1.01 was not met in 25 steps: 0." in row.figures["target_seconds"].how


def test_steps_are_timed_again_where_the_machine_was_noisy(monkeypatch):
    for name, value in {"OTHERS": 1.0, "WARM": 0.0, "RUN": 0.0}.items():
        monkeypatch.setattr(measuring, name, value)
    apart = iter([0.5, 0.2, 0.01, 0.01])
    monkeypatch.setattr(measuring, "spread", lambda times: next(apart))
    figures = bench().row("mlp", dataclasses.replace(SHORT, steps=25)).figures
    assert figures["step_seconds"].value > 0
    assert figures["step_seconds"].how.endswith("; timed 3 times, for it was too noisy before")
    assert figures["spread"].value == 0.01


def test_a_family_that_cannot_be_measured_is_a_row_that_says_why():
    family = dataclasses.replace(SHORT, config="configs/none.py")
    row = bench().row("mlp", family)
    assert row.failed.startswith("no config at configs/none.py")
    assert row.figures == {}


def test_counters_are_asked_for_steps_that_fill_their_window():
    setup = prepare(SHORT.experiment(), [CPU])
    step = setup.step().lower(*setup.example()).compile()
    made = []

    def counted(*args):
        made.append(1)
        return step(*args)

    class Meter:
        def joules_per_step(self, steps):
            assert made  # the initial state was made before
            before, start = len(made), time.perf_counter()
            count = steps(0.1)
            assert time.perf_counter() - start >= 0.1
            assert count == len(made) - before > 0
            return 7.0, "by a counter"

    found = bench(counters=(Meter(), ""))._energy(setup, counted, 0.01)
    assert (found.value, found.qualifier, found.how) == (7.0, "measured", "by a counter")


class H100:
    device_kind, platform = "NVIDIA H100 80GB HBM3", "gpu"


def test_money_is_by_the_price_given_or_by_the_list():
    taken = results.Figure(value=1800.0, qualifier="measured", how="by the clock")
    given = bench(device=H100(), price=3.0)._money(taken)
    assert (given.value, given.how) == (1.5, "target_seconds at 3 USD an hour, as given")
    listed = bench(device=H100())._money(taken)
    assert listed.value == energy.cost("h100-sxm", 1, 1800.0).money.value > 0
    assert "USD a chip-hour" in listed.how
    assert bench()._money(taken).how.startswith("no price was given: --price takes")
    absent = results.unavailable("too noisy")
    assert bench(price=3.0)._money(absent) == absent


def test_board_power_is_an_estimate():
    found = bench(device=H100())._energy(None, None, 0.01)
    assert (found.value, found.qualifier) == (pytest.approx(7.0), "estimated")
    assert "700 W" in found.how


def stat(path, user, steal=0):
    """As proc(5) says, in ticks of which there are so many a second."""
    ticks = os.sysconf("SC_CLK_TCK")
    numbers = [user * ticks, 0, 0, 10**9, 10**9, 0, 0, steal * ticks, 0, 0]
    path.write_text(f"cpu  {' '.join(map(str, numbers))}\ncpu0 1 2 3\n")


@pytest.mark.parametrize(("user", "steal", "share"), [(0, 0, 0), (3, 0, 0.2), (2, 4, 0.5)])
def test_others_are_all_of_the_cpu_but_this_process(user, steal, share, tmp_path, monkeypatch):
    """Of two cores, in 5 s of which this process worked for 1 s."""
    clock, own = iter([100.0, 105.0]), iter([7.0, 8.0])
    monkeypatch.setattr(others, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(others, "_own", lambda: next(own))
    monkeypatch.setattr(others.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(others.os, "cpu_count", lambda: 2)
    stat(tmp_path / "stat", 50)
    counted = others.Others()
    stat(tmp_path / "stat", 50 + user, steal)
    assert counted.share() == pytest.approx(share)


def test_where_the_system_does_not_tell_others_are_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(others, "_STAT", tmp_path / "none")
    assert others.Others().share() is None


def test_a_busy_cpu_is_noisy_and_a_gpus_host_is_not():
    assert bench().noisy(0.01, None) is bench().noisy(0.01, 0.04) is None
    assert bench().noisy(0.01, 0.3).how == (
        "too noisy: other programs took 30% of the CPU meanwhile, and 5% is borne"
    )

    class GPU:
        platform = "gpu"

    assert bench(device=GPU()).noisy(0.01, 0.3) is None
    assert bench(device=GPU()).noisy(0.2, 0.0).value is None


# Statistics.


def test_spread_is_of_the_middle_half():
    assert measuring.spread([1.0] * 9 + [50.0]) == 0
    assert measuring.spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)


def test_an_interval_holds_its_median_and_narrows_with_rounds():
    rng = np.random.default_rng(0)
    widths = []
    for count in (10, 100, 1000):
        times = np.exp(0.1 * rng.normal(size=count)).tolist()
        low, high = measuring.interval(times)
        assert low <= np.median(times) <= high
        assert low <= 1 <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 1.5
    assert widths[2] < widths[1] / 2


def test_laps_are_between_logged_rows():
    rows = [
        {"split": "train", "step": 10, "seconds": 1.0},
        {"split": "validation", "step": 10, "seconds": 1.0},
        {"split": "train", "step": 30, "seconds": 5.0},
    ]
    assert measuring._laps(rows) == [0.1, 0.2]


# What is measured.


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_decays_over_its_own_steps_and_is_judged_as_it_goes(family):
    e = family.experiment()
    assert e.eval_split == e.target.split == "validation"
    assert e.steps % e.eval_every == 0
    rate = e.optimizer.update.kwargs["learning_rate"]
    assert isinstance(rate, float) or rate.kwargs["decay_steps"] == e.steps


def test_texts_alphabets_fit_in_the_fixed_vocabulary():
    assert len(PythonReference.alphabet()) <= families.VOCAB
    for name in ("lstm", "transformer"):
        model = FAMILIES[name].experiment().model
        assert model.vocab == families.VOCAB
        assert getattr(model, "outputs", model.vocab) == families.VOCAB


# The command.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "none/mine.json"], "cannot write none/mine.json: there is no folder none"),
        (["--out", "docs"], "cannot write docs: it is a folder"),
        (["--out", "x.json", "--seconds", "0"], "--seconds must be more than 0, not 0"),
        (["--out", "x.json", "--price", "-2"], "--price must be more than 0 USD an hour, not -2"),
        (["--out", "x.json", "--only", "rnn"], "rnn"),
        ([], "--out"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(args, message, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "Bench", None)
    with pytest.raises(SystemExit) as end:
        commands.the_suite(args)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert not pathlib.Path("x.json").exists()


def test_a_compiled_step_is_timed_in_chunks():
    setup = prepare(SHORT.experiment(), [CPU])
    step = setup.step().lower(*setup.example()).compile()
    made = []

    def counted(*args):
        made.append(1)
        return step(*args)

    times = list(itertools.islice(loop.chunks(setup, counted, 4), 3))
    assert len(made) == 12
    assert min(times) > 0
