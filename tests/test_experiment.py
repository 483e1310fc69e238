import dataclasses
import json

import pytest

from configs import mlp_cancer, transformer_text
from research import UserError, experiment
from research.data.tfds import TFDS
from research.experiment import EarlyStop, Experiment, Target
from research.models.mlp import MLPConfig
from research.optim import Optax, Optimizer
from research.tasks import Classify


def changed(**fields):
    return dataclasses.replace(mlp_cancer.config(), **fields)


@pytest.mark.parametrize("config", [mlp_cancer.config, transformer_text.config])
def test_json_gives_the_same_experiment_back(config):
    text = experiment.dumps(config())
    assert experiment.from_json(json.loads(text)) == config()
    assert json.loads(text)["class"] == "research.experiment:Experiment"


def test_json_holds_every_field_of_the_tree():
    tree = experiment.to_json(mlp_cancer.config())
    assert tree["model"] == {
        "class": "research.models.mlp:MLPConfig",
        "features": 30,
        "sizes": [64, 32, 1],
        "activation": "relu",
        "dropout": 0.2,
    }
    assert set(tree) == {"class"} | {f.name for f in dataclasses.fields(Experiment)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(steps=0), "steps must be >= 1, not 0"),
        (lambda: changed(steps=1.5), "steps must be int, not 1.5"),
        (lambda: changed(batch_size="all"), "batch_size must be int or None, not 'all'"),
        (lambda: changed(batch_size=0), "batch_size must be >= 1, not 0"),
        (lambda: changed(ema=1.0), "ema must be > 0 and < 1, not 1.0"),
        (lambda: changed(seed=-1), "seed must be >= 0 and < 2147483648, not -1"),
        (lambda: changed(model=3), "model must be Model, not 3"),
        (
            lambda: changed(model=MLPConfig(features=30, sizes=(1,), dropout=1.5)),
            "model.dropout must be >= 0 and < 1, not 1.5",
        ),
        (
            lambda: changed(model=MLPConfig(features=30, sizes=(1,), activation="rely")),
            "model.activation must be one of relu, gelu, silu, tanh, sigmoid, not 'rely'",
        ),
        (
            lambda: changed(early_stop=EarlyStop(patience=2)),
            "early_stop.patience needs eval_every: it counts evaluations",
        ),
        (
            lambda: changed(early_stop=EarlyStop(keep_best=True)),
            "early_stop.keep_best needs eval_every: it compares evaluations",
        ),
        (
            lambda: changed(early_stop=EarlyStop(ema=True)),
            "early_stop.ema needs ema: no moving average is kept",
        ),
        (
            lambda: changed(target=Target(metric="accuracy", value=0.9, split="test_ema")),
            "target.split = 'test_ema' needs ema: no moving average is kept",
        ),
        (
            lambda: changed(target=Target(metric="accuracy", value="high", split="test")),
            "target.value must be float, not 'high'",
        ),
        (
            lambda: changed(data=TFDS(name="beasts", size=(0, 3))),
            "data.size must be >= 1, not (0, 3)",
        ),
        (
            lambda: changed(task=Classify(class_weights=(1.0, float("nan")))),
            "task.class_weights must be > 0, not (1.0, nan)",
        ),
        (
            lambda: changed(task=Classify(class_weights=(1.0, float("inf")))),
            "task.class_weights must be finite, not (1.0, inf)",
        ),
    ],
)
def test_a_bad_field_is_named_with_what_would_be_right(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def with_class(name, **fields):
    tree = experiment.to_json(mlp_cancer.config())
    tree["model"] = {"class": name, **fields}
    return tree


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (with_class("os:system"), ["model", "os:system", "--allow os"]),
        (with_class("research.models.mlp:MLP"), ["model", "not a dataclass"]),
        (with_class("research.models.mlp:Nothing"), ["model", "cannot be found"]),
        (with_class("research.nowhere:MLP"), ["model", "cannot be found"]),
        (
            with_class("research.models.mlp:MLPConfig", features=3, size=[1]),
            ["unknown field model.size", "did you mean sizes?"],
        ),
        (with_class("research.models.mlp:MLPConfig", features=3), ["model", "sizes"]),
        (
            with_class("research.models.mlp:MLPConfig", features=3, sizes=[4, 2.5]),
            ["model.sizes must be", "(4, 2.5)"],
        ),
        (
            with_class("research.models.mlp:MLPConfig", features=True, sizes=[4]),
            ["model.features must be int, not True"],
        ),
        (
            with_class("research.models.lstm:LSTMConfig", outputs=3, vocab=3, width="128"),
            ["model.width must be int, not '128'"],
        ),
        # A class that an allowed module happens to import is not one of its own.
        (with_class("research.train:nnx.GraphDef"), ["model", "flax", "not allowed"]),
    ],
)
def test_json_refuses_what_it_should_not_build(tree, words):
    with pytest.raises(UserError) as error:
        experiment.from_json(tree)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_module_of_another_package_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        "import dataclasses, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ran').touch()\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class C:\n"
        "    def make(self, rngs): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError):
        experiment.from_json(with_class("elsewhere:C"))
    assert not (tmp_path / "ran").exists()
    found = experiment.from_json(with_class("elsewhere:C"), allow=["elsewhere"])
    assert type(found.model).__name__ == "C"
    assert (tmp_path / "ran").exists()


def refused(**fields):
    old = experiment.to_json(mlp_cancer.config())
    return set(experiment.refusals(old, experiment.to_json(changed(**fields))))


def test_a_continued_run_may_change_how_it_runs_but_not_what_it_computes():
    assert refused() == set()
    assert refused(steps=7, log_every=7, save_every=7, eval_every=7, keep=7, target=None) == set()
    assert refused(seed=1, batch_size=16) == {"seed", "batch_size"}
    model = MLPConfig(features=30, sizes=(64, 16, 1), dropout=0.2)
    assert refused(model=model) == {"model.sizes"}
    slower = Optimizer(update=Optax("adamw", {"learning_rate": 1e-4, "weight_decay": 0.1}))
    assert refused(optimizer=slower) == {"optimizer.update.kwargs.learning_rate"}


def test_a_continued_run_may_find_its_data_elsewhere():
    old = changed(data=TFDS(name="mnist"))
    new = dataclasses.replace(old, data=TFDS(name="mnist", data_dir="there", threads=2))
    assert not experiment.refusals(*map(experiment.to_json, (old, new)))
    new = dataclasses.replace(old, data=TFDS(name="mnist", train="train[:9%]"))
    assert set(experiment.refusals(*map(experiment.to_json, (old, new)))) == {"data.train"}


def test_the_pace_of_evaluation_is_fixed_where_it_stops_the_run():
    old = changed(early_stop=EarlyStop(patience=2), eval_every=10)
    new = dataclasses.replace(old, eval_every=20)
    assert set(experiment.refusals(*map(experiment.to_json, (old, new)))) == {"eval_every"}


@pytest.mark.parametrize(("goal", "values"), [("min", [3, 2, 2, 4]), ("max", [1, 2, 2, 0])])
def test_early_stop_counts_evaluations_without_improvement(goal, values):
    rule = EarlyStop(patience=2, metric="m", goal=goal)
    seen, over = rule.start(), []
    for value in values:
        seen = rule.after(seen, value, len(over) + 1)
        over.append(bool(rule.over(seen)))
    assert over == [False, False, False, True]
    assert rule.best(seen) is None
    assert dataclasses.replace(rule, keep_best=True).best(seen) == 2
    assert dataclasses.replace(rule, keep_best=True).best(rule.start()) is None


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [("max", 0.9, True), ("max", 0.89, False), ("min", 0.9, True), ("min", 0.91, False)],
)
def test_target(goal, value, met):
    assert Target(metric="m", value=0.9, split="test", goal=goal).met(value) is met
