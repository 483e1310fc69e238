"""Optimizers at equal model FLOPs: the budget, the search, divergence, resuming, and the table."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import tiny

from research import UserError, compute, train
from research.bench import commands, methods, optimizers
from research.bench.methods import METHODS, PLAIN, planned
from research.bench.optimizers import Row
from research.optim import Optax, Optimizer
from research.setup import prepare

# ---- equal model FLOPs


@pytest.mark.parametrize("name", METHODS)
def test_every_optimizer_gets_as_many_steps_as_the_budget_holds(name):
    base = tiny.mlp(steps=50)
    setup = prepare(planned(base, PLAIN, 1.0, 50, 0), tiny.ONE)
    budget = 50 * compute.count(setup.step().trace(*setup.abstract_example())).model_flops
    row = optimizers.affordable("mlp", name, base, METHODS[name], budget)
    setup = prepare(planned(base, METHODS[name], 1.0, 50, 0), tiny.ONE)
    step = compute.count(setup.step().trace(*setup.abstract_example())).model_flops
    assert row.flops_per_step == step
    assert row.steps * step <= budget < (row.steps + 1) * step
    assert row.batch_size == setup.batch_size
    dear = {"sgd, full batch": Fraction(1, 4), "sgd, single example": 16}
    if name.startswith("sam"):
        dear[name] = Fraction(1, 2)
    if name != "muon":  # whose matrix products are its own
        assert row.steps == math.floor(50 * dear.get(name, 1))
    else:
        assert 0 < row.steps < 50


def test_a_step_dearer_than_the_budget_trains_nothing(tmp_path):
    chosen = {"sgd, full batch": METHODS["sgd, full batch"]}
    (row,) = optimizers.measure("mlp", tiny.mlp(steps=3), tmp_path / "runs", chosen)
    assert (row.steps, row.mean, row.losses) == (0, None, ())
    assert row.note == "unavailable: one step costs 1.33 budgets"
    assert not (tmp_path / "runs").exists()


# ---- the search


@pytest.mark.parametrize("least", range(-8, 9))
def test_the_search_finds_the_best_and_goes_on_at_an_edge(least):
    tried = optimizers.search(lambda k: (k - least) ** 2)
    first, last = optimizers.GRID[0] - optimizers.FURTHER, optimizers.GRID[-1] + optimizers.FURTHER
    assert optimizers.best(tried) == max(first, min(least, last))
    # As far as the search may go, one more than the best on either side is enough.
    low, high = min(optimizers.GRID[0], least - 1), max(optimizers.GRID[-1], least + 1)
    assert set(tried) == set(range(max(first, low), min(last, high) + 1))


def test_the_search_among_rates_that_diverge():
    low = optimizers.search(lambda k: math.inf if k > -4 else 1.0 - k)
    assert optimizers.best(low) == -4
    assert min(low) == -5
    none = optimizers.search(lambda k: math.inf)
    first = optimizers.GRID[0] - optimizers.FURTHER
    assert (optimizers.best(none), min(none)) == (first, first)
    assert max(none) == optimizers.GRID[-1]


# ---- runs


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(optimizers, "FURTHER", 1)
    monkeypatch.setattr(optimizers, "SEEDS", (1, 2))


def sgd(rate, _):
    return Optimizer(update=Optax("sgd", {"learning_rate": rate}))


CHOSEN = {
    "plain": dataclasses.replace(PLAIN, rate=0.1),
    "too fast": methods.Method(rate=1e30, make=sgd),
}


def measured(tmp_path, said):
    base = tiny.lines(steps=25)
    return list(optimizers.measure("lines", base, tmp_path / "runs", CHOSEN, said.append))


def test_rows_are_of_real_runs_and_a_second_call_trains_nothing(short, tmp_path, monkeypatch):
    said = []
    plain, fast = rows = measured(tmp_path, said)

    def loss(rate, seed):
        e = planned(tiny.lines(steps=25), CHOSEN["plain"], rate, 25, seed)
        found = train.train(prepare(e, tiny.ONE), tmp_path / f"{rate}_{seed}", quiet=True)
        assert found.flops_per_step == plain.flops_per_step
        return found.metrics["validation"]["loss"]

    assert list(plain.tried)[:3] == ["0.032", "0.1", "0.32"]
    assert f"{plain.rate:g}" == min(plain.tried, key=plain.tried.get)
    assert plain.tried["0.1"] == loss(0.1, 0)
    assert plain.losses == (loss(plain.rate, 1), loss(plain.rate, 2))
    assert plain.mean == np.mean(plain.losses)
    assert plain.deviation == pytest.approx(np.std(plain.losses, ddof=1))
    assert (plain.steps, plain.note) == (25, "")

    assert fast.note == "diverged: 2 of 2 seeds"
    assert (fast.losses, fast.mean, fast.deviation) == ((None, None), None, None)
    assert fast.edge
    assert set(fast.tried.values()) == {None}
    reason = json.loads(
        (tmp_path / "runs/lines/too_fast/rate_1e+30_seed_0/diverged.json").read_text()
    )
    assert "loss is" in reason["reason"]

    assert len(said) == len(plain.tried) + len(fast.tried) + 4
    assert "too fast  rate 1e+30  seed 0  25 steps  diverged" in "\n".join(said)

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(train.run, "start", refuse)
    assert measured(tmp_path, []) == rows


def test_a_mark_of_divergence_is_of_one_experiment(tmp_path):
    def at(rate):
        e = planned(tiny.lines(), methods.Method(rate=rate, make=sgd), rate, 12, 0)
        return optimizers.trained(e, tmp_path / "run")

    assert at(1e30) is None
    assert at(1e30) is None
    assert at(0.1) is not None
    with pytest.raises(UserError, match="give another --workdir"):
        at(0.2)


# ---- the table


def row(name, *losses, accuracies=(), **fields):
    given = {"steps": 300, "budget": 3000, "flops_per_step": 10, "batch_size": 64, "rate": 0.1}
    return Row(model="cnn", optimizer=name, losses=losses, accuracies=accuracies, **given | fields)


ROWS = [
    row("dear", steps=0, flops_per_step=4500, rate=None, batch_size=1257),
    row("slow", 2.0, 3.0, 4.0, accuracies=(0.5, 0.6, 0.7), edge=True),
    row("gone", 1.0, None, 1.0, accuracies=(0.9, 0.9)),
    row("fast", 0.25, 0.25, 0.25, accuracies=(0.9, 0.9, 0.9)),
    row("exact", 0.0, 0.0, 0.0, accuracies=(1.0, 1.0, 1.0)),
]


def test_the_table():
    assert optimizers.table(ROWS).splitlines() == [
        "cnn: validation loss after 3000 model FLOPs",
        "",
        "optimizer               batch   steps   FLOPs/step      rate      loss   deviation"
        "   test accuracy",
        "exact                      64     300           10       0.1    0.0000      0.0000"
        "          1.0000",
        "fast                       64     300           10       0.1    0.2500      0.0000"
        "          0.9000",
        "slow                       64     300           10      0.1*    3.0000      1.0000"
        "          0.6000",
        "dear                    1,257       0         4500            unavailable: one step costs"
        " 1.50 budgets",
        "gone                       64     300           10       0.1  diverged: 1 of 3 seeds",
        "* the least or the greatest rate tried: the best may lie beyond",
    ]
    text = optimizers.table([row("a", 1.0, 1.0, 1.0)])
    assert "accuracy" not in text
    assert "*" not in text


def test_the_command_prints_draws_and_writes(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "METHODS", CHOSEN)
    monkeypatch.setattr(optimizers, "base", lambda model, steps: tiny.lines(steps=steps))
    given = ["--workdir", str(tmp_path / "runs"), "--only", "lstm", "--steps", "12"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    commands.the_optimizers([*given, *files])
    out, err = capsys.readouterr()
    assert out.startswith("lstm: validation loss after ")
    assert err.count("\n") == 12, "a plain line for each run"
    found = json.loads((tmp_path / "a.json").read_text())
    assert [r["optimizer"] for r in found["rows"]] == ["plain", "too fast"]
    first, last = found["rows"]
    assert first["mean"] == pytest.approx(np.mean(first["losses"]))
    assert (last["mean"], last["note"]) == (None, "diverged: 2 of 2 seeds")
    assert "jax" in found["versions"]
    assert "diverged: 2 of 2 seeds" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "--steps must be 1 or more, not 0"),
        (["--only", "mlp"], "--only"),
        (["--plot", "a.jpg"], "cannot write .jpg; use .png or .svg"),
        (["--json", "nowhere/a.json"], "there is no folder nowhere"),
        (["--workdir", "README.md"], "README.md is a file"),
        (["--rate", "1"], "unknown field --rate"),
    ],
)
def test_a_mistake_ends_in_one_line_and_makes_nothing(argv, words, tmp_path, capsys):
    if "--workdir" not in argv:
        argv = [*argv, "--workdir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stopped:
        commands.the_optimizers(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
