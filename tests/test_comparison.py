"""Ratios and their intervals, and files that cannot be compared."""

import csv
import dataclasses
import io
import json

import benchmarks
import numpy as np
import pytest

from research import UserError
from research.bench import comparison, plans, tables
from research.bench import result as results
from research.bench.result import FIGURES, Figure, unavailable


def compared(tmp_path, baseline=None, **found):
    paths = [benchmarks.written(tmp_path / f"{name}.json", one) for name, one in found.items()]
    return comparison.read(paths, baseline)


def test_a_machine_twice_as_fast_is_twice_as_fast(tmp_path):
    slow = benchmarks.result(benchmarks.row("cnn", 0.02), benchmarks.row("lstm", 0.9))
    fast = benchmarks.result(benchmarks.row("cnn", 0.01), benchmarks.row("lstm", 0.1))
    c = compared(tmp_path, slow=slow, fast=fast)
    found = c.ratio("fast", "cnn")
    assert found.value == pytest.approx(2)
    assert 1.95 < found.low < 2 < found.high < 2.05
    assert c.overall("fast").value == pytest.approx(np.sqrt(2 * 9))
    assert c.overall("fast").low < np.sqrt(18) < c.overall("fast").high
    assert c.ratio("slow", "cnn") == Figure(value=1.0, qualifier="exact", how="the baseline itself")
    other = compared(tmp_path, "fast", slow=slow, fast=fast)
    assert other.ratio("slow", "cnn").value == pytest.approx(1 / 2)


def test_intervals_hold_the_true_ratio_about_as_often_as_they_say(tmp_path):
    """Of lognormal rounds whose medians are as 1.3 to 1."""
    rng, held, trials = np.random.default_rng(1), 0, 100
    ours, theirs = benchmarks.row("cnn"), benchmarks.row("cnn")
    for _ in range(trials):
        rounds = np.exp(0.05 * rng.normal(size=(2, 40))) * [[1.3], [1.0]]
        c = comparison.Comparison(
            results={
                name: benchmarks.result(dataclasses.replace(row, rounds=tuple(of)))
                for name, row, of in zip(("a", "b"), (ours, theirs), rounds.tolist(), strict=True)
            },
            plans={},
            baseline="a",
            warnings=(),
        )
        found = c.ratio("b", "cnn")
        held += found.low <= 1.3 <= found.high
    assert 88 <= held <= 100


def test_what_is_unavailable_has_no_ratio_and_a_reason(tmp_path):
    noisy = benchmarks.row("cnn", step_seconds=unavailable("too noisy: 14%"))
    less = benchmarks.row("lstm", model_flops=Figure(value=5, qualifier="exact", how="counted"))
    c = compared(tmp_path, a=benchmarks.result(), b=benchmarks.result(noisy, less))
    assert c.ratio("b", "cnn") == unavailable("b: too noisy: 14%")
    assert c.ratio("b", "lstm").how == (
        "not the same work: 5 model FLOPs, the baseline 1,000,000,000"
    )
    assert c.overall("b") == unavailable("no model has a time on both machines")
    assert c.ratio("a", "cnn").value == 1
    assert c.left_out("b") == ["cnn", "lstm"]
    c = compared(tmp_path, a=benchmarks.result(benchmarks.row("cnn")), b=benchmarks.result())
    assert c.ratio("b", "lstm") == unavailable("a: not measured there")
    assert c.overall("b").how.startswith("geometric mean over cnn; without lstm;")
    assert "b: without lstm" in tables.text(c)


def test_bad_files_are_named_and_the_others_compared(tmp_path):
    broken = results.to_json(benchmarks.result())
    broken = json.loads(json.dumps(broken))
    broken["rows"][0]["figures"]["mfu_measured"]["value"] = 1.2
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps(broken)[:500])
    c = comparison.read(
        [
            benchmarks.written(tmp_path / "good.json", benchmarks.result()),
            benchmarks.written(tmp_path / "broken.json", broken),
            cut,
            tmp_path / "absent.json",
            benchmarks.written(tmp_path / "notes.json", {"a": "b" * 1000}),
            benchmarks.written(tmp_path / "rows.json", broken | {"rows": "b" * 1000}),
        ]
    )
    assert list(c.results) == ["good"]
    ends = [line.removeprefix(str(tmp_path)) for line in c.warnings]
    assert ends[0].startswith("/broken.json: rows.cnn.figures.mfu_measured.value = 1.2 is impos")
    assert ends[1].startswith("/cut.json: not whole JSON, cut short or damaged")
    assert ends[2] == "/absent.json: No such file or directory"
    assert ends[3].startswith("/notes.json: not a benchmark")
    assert ends[4].startswith("/rows.json: rows must be")
    assert max(map(len, c.warnings)) < 300
    with pytest.raises(
        UserError, match=r"cut.json: .*; no file has a measurement, or a plan, to compare"
    ):
        comparison.read([cut])
    with pytest.raises(UserError, match=r"--baseline 'god' is no measurement; did you mean good\?"):
        comparison.read([tmp_path / "good.json"], "god")


def test_what_makes_measurements_differ_is_told(tmp_path):
    row = benchmarks.row("cnn")
    other = dataclasses.replace(row, experiment={"steps": 300}, data="1" * 64)
    failed = dataclasses.replace(row, name="lstm", figures={}, failed="no memory")
    c = compared(tmp_path, a=benchmarks.result(), b=benchmarks.result(other, failed, suite=2))
    assert c.warnings == [
        "b is of version 2 of the suite, which is now 1: its figures may not mean the same",
        "b: lstm failed: no memory",
        "cnn has other settings on b than a: steps",
        "cnn was trained on other data on b than on a: times to the target are of different tasks",
    ]
    assert c.ratio("b", "lstm") == unavailable("b: no memory")


def test_files_of_one_name_are_told_apart(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    paths = [
        benchmarks.written(tmp_path / name / "mine.json", benchmarks.result()) for name in "xy"
    ]
    assert list(comparison.read([*paths, paths[0]]).results) == list(map(str, paths))


# Plans.


def test_a_plan_stands_beside_the_measurement_of_the_same_work(tmp_path):
    c = compared(tmp_path, a=benchmarks.result(), plan=benchmarks.plan())
    ok, small = c.planned
    assert (ok.config, ok.target, ok.chips) == ("cnn_digits", "h100:8", 8)
    ratio = c.plan_ratio(ok)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((5, 10, 20))
    assert ratio.qualifier == "estimated"
    assert small.step_seconds == unavailable("does not fit: 3 GiB too many")
    assert c.plan_ratio(small) == small.step_seconds
    other = dataclasses.replace(ok, model_flops=7)
    assert c.plan_ratio(other).value is None
    assert (ok.hours.low, ok.hours.value, ok.hours.high) == (1.25, 2.5, 5)
    assert ok.kwh.how == "by scripts/plan.py: PUE 1.1"
    assert ok.money == unavailable("no list price")
    assert c.warnings == ["the price is old"]
    text = tables.text(c)
    assert "h100:8" in text
    assert "500 us to 2 ms" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mfu": 1.2}, "targets.x.mfu.value = 1.2 is impossible"),
        ({"step_seconds": -1}, "targets.x.step_seconds.value = -1 is impossible"),
        (
            {"step_seconds": {"value": "fast"}},
            "targets.x.step_seconds.value = 'fast' is impossible",
        ),
        ({"chips": 2.5}, "targets.x.chips = 2.5 is not a whole number"),
        ({"target": 3}, "targets.2.target must be the name"),
        ({"step_seconds": {"value": 1, "low": 2, "high": 3}}, "1 is not within 2 to 3"),
        ({"step_seconds": {"value": 1, "qualifier": "sure"}}, "qualifier = 'sure' is none"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_its_field(change, message):
    with pytest.raises(UserError, match=message):
        plans.from_json(benchmarks.plan("c.py", {"target": "x", "status": "ok"} | change))


def test_a_plans_absent_figures_are_unavailable():
    *_, row = plans.from_json(benchmarks.plan("c.py", {"target": "x", "status": "ok"}))
    assert row.mfu == unavailable("the plan has none")
    assert row.chips is None


# CSV.


def test_csv_has_every_figure_with_how_it_was_got(tmp_path):
    c = compared(tmp_path, a=benchmarks.result(), b=benchmarks.result(), p=benchmarks.plan())
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(c))))
    assert len(rows) == 2 * (1 + 2 * (1 + len(FIGURES))) + 2 * 7
    assert all(row["how"] and row["qualifier"] for row in rows)
    (found,) = (
        row
        for row in rows
        if (row["machine"], row["model"], row["figure"]) == ("b", "lstm", "step_seconds")
    )
    assert (float(found["value"]), found["unit"], found["qualifier"]) == (0.1, "s", "measured")
    assert {row["value"] for row in rows if row["qualifier"] == "unavailable"} == {""}
