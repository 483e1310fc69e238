"""Baselines of tables against values by hand."""

import dataclasses

import numpy as np
import pytest
import tiny

from research import UserError
from research.bench import linear
from research.data.splits import Examples


def data(bad=False):
    """Two classes that a threshold on the second input parts, but for every tenth row."""
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    y = ((x[:, 1] > 0) != (np.arange(200) % 10 == 0)).astype(np.int32)
    rows = {"inputs": x, "targets": y}
    if bad:
        rows |= {"bad": np.arange(200) % 4 == 1}
    return {
        "train": Examples({k: v[:100] for k, v in rows.items()}),
        "test": Examples({k: v[100:] for k, v in rows.items()}),
    }


def test_baselines_by_hand():
    found = linear.accuracies(data())
    assert set(found) == {"majority class", "one input, one threshold", "logistic regression"}
    train, test = (split.rows["targets"] for split in data().values())
    majority = np.mean(test == (np.mean(train) > 0.5))
    assert found["majority class"] == {"test": pytest.approx(majority)}
    assert 0.85 <= found["one input, one threshold"]["test"] <= 0.95
    assert 0.75 <= found["logistic regression"]["test"] <= 0.95


def test_bad_rows_have_no_part():
    spoiled = data(bad=True)
    kept = {
        name: Examples({k: v[~split.rows["bad"]] for k, v in split.rows.items() if k != "bad"})
        for name, split in spoiled.items()
    }
    assert linear.accuracies(spoiled) == linear.accuracies(kept)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (tiny.Words(), "examples with inputs and targets"),
        (tiny.Lines(), "one class an example"),
    ],
)
def test_what_has_no_linear_baseline(source, match):
    with pytest.raises(UserError, match=match):
        linear.accuracies(source.load())


def test_divisions_are_those_of_the_source():
    e = tiny.mlp(data=tiny.Points())
    assert list(linear.divided(e, 1)) == [e]
    with pytest.raises(UserError, match="Points has no field split"):
        list(linear.divided(e, 2))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Divided(tiny.Points):
        split: int = 7

    found = linear.divided(dataclasses.replace(e, data=Divided()), 3)
    assert [one.data.split for one in found] == [0, 1, 2]


def test_the_table_gives_mean_deviation_and_range():
    text = linear.table({"a": [{"test": 0.5}, {"test": 0.75}], "b": [{"test": 1.0}]})
    a, b = (line.split() for line in text.splitlines()[1:])
    assert a == ["a", "62.5", "17.7", "50.0-75.0"]
    assert b == ["b", "100.0"]
