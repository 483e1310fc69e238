"""Metrics over a split against NumPy over all its rows at once."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn import metrics

from research import evaluate, parallel, tasks
from research.data.splits import Examples, Streams, Windows


def pair(total, weight):
    return np.float32(total), np.float32(weight)


def test_means_weigh_their_batches():
    results = [
        {"loss": pair(6, 3), "accuracy": pair(1, 1)},
        {"loss": pair(1, 1), "accuracy": pair(0, 3)},
    ]
    assert evaluate.mean(results) == {"loss": 7 / 4, "accuracy": 1 / 4}


def test_means_put_the_loss_first():
    names = ("accuracy", "loss", "mse")
    for order in itertools.permutations(names):
        found = evaluate.mean([{name: pair(1, 1) for name in order}])
        assert next(iter(found)) == "loss"
        assert sorted(found) == sorted(names)


def test_a_batch_without_weight_is_0_by_itself_and_nothing_beside_others():
    empty, full = {"loss": pair(0, 0)}, {"loss": pair(6, 3)}
    assert evaluate.mean([empty]) == {"loss": 0.0}
    assert evaluate.mean([empty, full]) == {"loss": 2.0}


def test_sums_do_not_round():
    # In float32 the ones would vanish next to 2**24, in float64 next to 2**60.
    for totals in ([2.0**24] + [1.0] * 1000, [2.0**60] + [1.0] * 1000 + [-(2.0**60)]):
        weights = [3.0] + [1.0] * (len(totals) - 1)
        found = evaluate.mean([{"loss": pair(*p)} for p in zip(totals, weights, strict=True)])
        assert found["loss"] == float(sum(map(Fraction, totals)) / sum(map(Fraction, weights)))


class Tiny(nnx.Module):
    """Wrong numbers in every batch, unless dropout is off and statistics are the running ones."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.norm.mean[...] = jnp.arange(4.0)
        self.norm.var[...] = jnp.arange(1.0, 5.0)
        self.dropout = nnx.Dropout(0.5)
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        return self.linear(self.dropout(self.norm(inputs), rngs=rngs))


def parts(model):
    graph, *states = nnx.split(model, nnx.Param, ...)
    return graph, *map(nnx.to_pure_dict, states)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("rows", "batch_size"), [(21, 8), (24, 8), (5, 16)])
def test_evaluation_is_numpy_over_all_rows(devices, rows, batch_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    y = rng.integers(3, size=rows).astype(np.int32)
    mesh = parallel.Parallel(fsdp=devices).mesh(batch_size, jax.devices()[:devices])
    model = Tiny(nnx.Rngs(0))
    graph, params, model_state = parts(model)
    params, model_state = jax.device_put(
        (params, model_state), parallel.place((params, model_state), mesh)
    )
    evaluator = evaluate.Evaluator(graph, tasks.Classify(), mesh)
    split = Examples({"inputs": x, "targets": y})
    found = evaluator(params, model_state, None, split, batch_size).metrics

    normal = (x - np.arange(4)) / np.sqrt(np.arange(1, 5) + model.norm.epsilon)
    logits = normal @ np.float64(model.linear.kernel) + np.float64(model.linear.bias)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(rows), y]
    assert list(found) == ["loss", "accuracy", "ece"]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == y).mean(), abs=1e-12)
    assert evaluator.step._cache_size() == 1


class Sum(nnx.Module):
    """Gives the sum of all inputs so far, which it carries."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def initial_carry(self, batch):
        return jnp.zeros((batch, 1))

    def __call__(self, inputs, carry=None, rngs=None):
        sums = jnp.cumsum(inputs.astype(jnp.float32), axis=1) * self.scale
        return sums if carry is None else (carry + sums, carry + sums[:, -1:])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("tokens", [41, 65, 70])
def test_a_carry_goes_from_batch_to_batch(devices, tokens):
    text = np.random.default_rng(1).integers(10, size=tokens)
    mesh = parallel.Parallel().mesh(8, jax.devices()[:devices])
    graph, params, model_state = parts(Sum())
    params = jax.device_put(params, parallel.replicated(mesh))
    carry = jax.device_put(np.full((8, 1), 1e6, np.float32), parallel.batched(mesh))
    evaluator = evaluate.Evaluator(graph, tasks.Regress(), mesh)
    for _ in range(2):
        found = evaluator(params, model_state, carry, Streams(text, 3), 8).metrics
        row = -(-(tokens - 1) // 8)
        inputs = [text[:-1][i : i + row] for i in range(0, tokens - 1, row)]
        sums = np.concatenate([np.cumsum(part) for part in inputs])
        assert found["loss"] == pytest.approx(((sums - text[1:]) ** 2).mean(), rel=1e-6)


def test_windows_are_weighted_by_their_tokens():
    text = np.random.default_rng(1).integers(10, size=30)
    mesh = parallel.Parallel().mesh(8)
    graph, params, model_state = parts(Sum())
    evaluator = evaluate.Evaluator(graph, tasks.Regress(), mesh)
    found = evaluator(params, model_state, None, Windows(text, 4), 8).metrics
    sums = np.concatenate([np.cumsum(text[i : min(i + 4, 29)]) for i in range(0, 29, 4)])
    assert found["loss"] == pytest.approx(((sums - text[1:]) ** 2).mean(), rel=1e-6)


class Given(nnx.Module):
    """Gives what it is given."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, inputs, rngs=None):
        return inputs * self.scale


def report(task, outputs, targets, batch_size, devices):
    mesh = parallel.Parallel(fsdp=devices).mesh(batch_size, jax.devices()[:devices])
    graph, params, model_state = parts(Given())
    params = jax.device_put(params, parallel.replicated(mesh))
    split = Examples({"inputs": outputs.astype(np.float32), "targets": targets})
    return evaluate.Evaluator(graph, task, mesh)(params, model_state, None, split, batch_size)


LABELS = np.arange(45) % 6
LOGITS = np.round(np.random.default_rng(0).normal(size=(45, 6)) + np.eye(6)[LABELS], 1)
BATCHES = pytest.mark.parametrize(("batch_size", "devices"), [(45, 1), (7, 1), (8, 8), (64, 8)])


@BATCHES
def test_metrics_of_many_classes_are_scikit_learns(batch_size, devices):
    task = tasks.Classify(top=5)
    found, tables = report(task, LOGITS, LABELS, batch_size, devices)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    rank = (LOGITS[np.arange(45), LABELS][:, None] < LOGITS).sum(1)
    assert list(found) == ["loss", "accuracy", "top_5", "ece"]
    assert found["loss"] == pytest.approx(metrics.log_loss(LABELS, p), rel=1e-6)
    assert abs(found["top_5"] - (rank < 5).mean()) <= 1 / 45  # a tie at the fifth place
    assert tables["confusion_matrix"] == metrics.confusion_matrix(LABELS, LOGITS.argmax(1)).tolist()
    whole = report(task, LOGITS, LABELS, 45, 1).metrics
    assert found == pytest.approx(whole, rel=1e-6)


@BATCHES
def test_metrics_of_two_classes_are_scikit_learns(batch_size, devices):
    logits, labels = LOGITS[:, :1], LABELS % 2
    found, tables = report(tasks.BinaryClassify(), logits, labels, batch_size, devices)
    p = 1 / (1 + np.exp(-logits[:, 0]))
    assert list(found) == ["loss", "accuracy", "auc", "ece"]
    assert found["loss"] == pytest.approx(metrics.log_loss(labels, p), rel=1e-6)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, logits[:, 0]), abs=1e-12)
    assert tables == {"confusion_matrix": metrics.confusion_matrix(labels, p > 0.5).tolist()}
    sure = np.maximum(p, 1 - p)
    bins = np.ceil(sure * 15)
    gaps = [abs((((p > 0.5) == labels) - sure)[bins == b].sum()) for b in range(1, 16)]
    assert found["ece"] == pytest.approx(sum(gaps) / 45, rel=1e-5)


@BATCHES
@pytest.mark.parametrize("shape", [(45,), (15, 3)])
def test_metrics_of_regression_are_scikit_learns(shape, batch_size, devices):
    outputs, targets = LOGITS[:, 0].reshape(shape), np.float32(2000 + LOGITS[:, 1]).reshape(shape)
    outputs = np.float32(outputs + 2000.3)
    found, tables = report(tasks.Regress(huber=1.0), outputs, targets, batch_size, devices)
    assert list(found) == ["loss", "mae", "mse", "r2"]
    targets = np.float64(targets)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(targets, outputs), rel=1e-6)
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(targets, outputs), rel=1e-6)
    assert found["r2"] == pytest.approx(metrics.r2_score(targets, outputs), rel=1e-5)
    assert tables == {}


def test_a_metric_that_a_split_leaves_undefined_is_left_out():
    found, _ = report(tasks.BinaryClassify(), LOGITS[:, :1], np.zeros(45, int), 8, 1)
    assert list(found) == ["loss", "accuracy", "ece"]


def test_names_are_those_of_an_evaluation():
    cases = [
        (tasks.Classify(top=5), LOGITS, LABELS),
        (tasks.BinaryClassify(), LOGITS[:, :1], LABELS % 2),
        (tasks.Regress(), LOGITS, LOGITS.astype(np.float32)),
    ]
    for task, outputs, targets in cases:
        batch = {"targets": targets, "weights": np.ones(45, np.float32)}
        score, kept = jax.eval_shape(
            lambda o, b, task=task: (task.score(o, b), task.gather(o, b)), outputs, batch
        )
        names = evaluate.names(task, score, kept)
        assert set(names) == set(report(task, outputs, targets, 8, 1).metrics)
