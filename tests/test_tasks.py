"""Losses against closed forms in NumPy, and what every pair of a model and a task must do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import log_loss, mean_absolute_error, top_k_accuracy_score

from research import UserError
from research.models.cnn import CNNConfig, LeNetConfig
from research.models.lstm import LSTMConfig
from research.models.mlp import MLPConfig
from research.models.transformer import TransformerConfig
from research.tasks import BinaryClassify, Classify, Mean, NextToken, Regress, weighted

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (4, 3)).astype(np.float32)
TARGETS = np.asarray([0, 2, 1, 1], np.int32)
WEIGHTS = np.asarray([1, 0.5, 0, 2], np.float32)


def log_softmax(x):
    return x - np.log(np.sum(np.exp(np.float64(x)), axis=-1, keepdims=True))


def batch_of(targets, weights, **others):
    return {"targets": targets, "weights": weights} | others


def assert_mean(mean, values, weights):
    """Against the sums over flat values and weights of the same size."""
    values, weights = np.ravel(values), np.ravel(weights)
    np.testing.assert_allclose(mean.total, values @ weights, rtol=1e-5)
    np.testing.assert_allclose(mean.weight, weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classify_is_the_cross_entropy_of_smoothed_targets(smoothing):
    metrics = Classify(label_smoothing=smoothing).score(LOGITS, batch_of(TARGETS, WEIGHTS))
    wanted = (1 - smoothing) * np.eye(3)[TARGETS] + smoothing / 3
    assert_mean(metrics["loss"], -np.sum(wanted * log_softmax(LOGITS), axis=-1), WEIGHTS)
    assert_mean(metrics["accuracy"], LOGITS.argmax(-1) == TARGETS, WEIGHTS)


def test_next_token_weighs_each_token():
    logits = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    targets, weights = np.asarray([[0, 4, 2], [1, 1, 3]]), np.float32([[1, 0, 2], [0.5, 1, 0]])
    metrics = NextToken().score(logits, batch_of(targets, weights))
    losses = [-log_softmax(logits)[b, t, targets[b, t]] for b, t in np.ndindex(2, 3)]
    assert_mean(metrics["loss"], losses, weights)
    assert_mean(metrics["accuracy"], logits.argmax(-1) == targets, weights)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_binary_classify_is_the_cross_entropy_of_a_sigmoid(dtype):
    logits = np.float32([[-3], [0.5], [2], [-0.1]])
    targets = np.asarray([0, 1, 0, 1], dtype)
    metrics = BinaryClassify().score(logits, batch_of(targets, WEIGHTS))
    p = 1 / (1 + np.exp(-np.float64(logits[:, 0])))
    losses = -np.where(targets == 1, np.log(p), np.log(1 - p))
    assert_mean(metrics["loss"], losses, WEIGHTS)
    assert_mean(metrics["accuracy"], [1, 1, 0, 0], WEIGHTS)


def test_binary_classify_at_extreme_logits_is_their_size_where_wrong_and_0_where_right():
    logits, targets = jnp.float32([[1e4], [-1e4], [1e4], [-1e4]]), jnp.int32([0, 1, 1, 0])

    def loss(logits):
        loss = BinaryClassify().score(logits, batch_of(targets, jnp.ones(4)))["loss"]
        return loss.total

    assert loss(logits) == 2e4
    assert np.array_equal(jax.grad(loss)(logits)[:, 0], [1, -1, 0, 0])


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 2)])
def test_regress_is_the_mean_square_over_all_values_of_an_example(shape):
    outputs, targets = RNG.normal(size=(2, *shape)).astype(np.float32)
    metrics = Regress().score(outputs, batch_of(targets, WEIGHTS))
    weights = np.broadcast_to(WEIGHTS.reshape(-1, *[1] * (len(shape) - 1)), shape)
    assert_mean(metrics["loss"], (outputs - targets) ** 2, weights)
    assert metrics["mse"] == metrics["loss"]
    flat = (a.reshape(4, -1) for a in (targets, outputs))
    expected = mean_absolute_error(*flat, sample_weight=WEIGHTS)
    np.testing.assert_allclose(metrics["mae"].mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("delta", [0.5, 3.0])
def test_huber_is_a_square_near_zero_and_a_line_beyond(delta):
    outputs, targets = RNG.normal(0, 2, size=(2, 4)).astype(np.float32)
    errors = np.abs(np.float64(outputs) - targets)
    losses = [e**2 / 2 if e <= delta else delta * (e - delta / 2) for e in errors]
    metrics = Regress(huber=delta).score(outputs, batch_of(targets, WEIGHTS))
    assert_mean(metrics["loss"], losses, WEIGHTS)
    assert_mean(metrics["mse"], errors**2, WEIGHTS)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_is_that_of_a_loop(gamma):
    losses = []
    for logits, target in zip(np.float64(LOGITS), TARGETS, strict=True):
        p = np.exp(logits[target]) / np.exp(logits).sum()
        losses.append(-((1 - p) ** gamma) * np.log(p))
    metrics = Classify(gamma=gamma).score(LOGITS, batch_of(TARGETS, WEIGHTS))
    assert_mean(metrics["loss"], losses, WEIGHTS)
    losses = []
    for logit, target in zip(np.float64(LOGITS[:, 0]), TARGETS % 2, strict=True):
        p = 1 / (1 + np.exp(-logit if target else logit))
        losses.append(-((1 - p) ** gamma) * np.log(p))
    metrics = BinaryClassify(gamma=gamma).score(LOGITS[:, :1], batch_of(TARGETS % 2, WEIGHTS))
    assert_mean(metrics["loss"], losses, WEIGHTS)


@pytest.mark.parametrize("task", [Classify(gamma=0.5), BinaryClassify(gamma=0.5)])
def test_focal_losss_gradient_is_finite_where_the_probability_rounds_to_1(task):
    sure = jnp.float32([[200.0], [-200.0]])
    outputs = jnp.concatenate([sure, -sure], axis=1) if isinstance(task, Classify) else sure
    for targets in (jnp.int32([1, 0]), jnp.int32([0, 1])):
        loss = lambda x: task.score(x, batch_of(targets, jnp.ones(2)))["loss"].total  # noqa: B023, E731
        assert np.isfinite(jax.grad(loss)(outputs)).all()


def test_class_weights_are_sample_weights_of_the_loss_alone():
    of_class = (0.5, 3.0, 1.0)
    found = Classify(class_weights=of_class).score(LOGITS, batch_of(TARGETS, WEIGHTS))
    p = np.exp(log_softmax(LOGITS))
    weights = WEIGHTS * np.asarray(of_class)[TARGETS]
    expected = log_loss(TARGETS, p, sample_weight=weights)
    np.testing.assert_allclose(found["loss"].mean(), expected, rtol=1e-5)
    assert found["accuracy"] == Classify().score(LOGITS, batch_of(TARGETS, WEIGHTS))["accuracy"]
    binary = BinaryClassify(class_weights=of_class[:2])
    for dtype in (np.int32, np.float32):
        targets = (TARGETS % 2).astype(dtype)
        found = binary.score(LOGITS[:, :1], batch_of(targets, WEIGHTS))
        p = 1 / (1 + np.exp(-np.float64(LOGITS[:, 0])))
        weights = WEIGHTS * np.asarray(of_class)[TARGETS % 2]
        expected = log_loss(TARGETS % 2, p, sample_weight=weights)
        np.testing.assert_allclose(found["loss"].mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("top", [2, 5])
def test_top_is_scikit_learns(top):
    logits, targets = RNG.normal(size=(50, 9)).astype(np.float32), RNG.integers(9, size=50)
    weights = RNG.integers(3, size=50).astype(np.float32)
    found = Classify(top=top).score(logits, batch_of(targets, weights))[f"top_{top}"]
    given = {"k": top, "sample_weight": weights, "labels": range(9)}
    expected = top_k_accuracy_score(targets, logits, **given)
    np.testing.assert_allclose(found.mean(), expected, rtol=1e-6)


def test_of_equal_logits_the_first_are_the_highest():
    batch = batch_of(np.arange(9), np.ones(9, np.float32))
    assert Classify(top=5).score(jnp.zeros((9, 9)), batch)["top_5"] == Mean(5, 9)


@pytest.mark.parametrize(
    ("shape", "weights", "total", "weight"),
    [
        ((2,), [1, 3], 0 * 1 + 1 * 3, 4),
        ((2, 2), [1, 3], (0 + 1) * 1 + (2 + 3) * 3, 2 * 4),
        ((2, 2), [[1, 0], [0, 3]], 0 * 1 + 3 * 3, 4),
        ((2, 2, 2), [[1, 0], [0, 3]], (0 + 1) * 1 + (6 + 7) * 3, 2 * 4),
    ],
)
def test_an_examples_weight_is_shared_by_its_values(shape, weights, total, weight):
    values = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    assert weighted(values, jnp.float32(weights)) == Mean(total, weight)


def test_weights_that_fit_no_value_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        weighted(jnp.ones((2, 3)), jnp.ones((2, 2)))


JUDGED = [
    (Classify(label_smoothing=0.1), LOGITS, TARGETS),
    (Classify(gamma=2.0, class_weights=(1.0, 2.0, 3.0), top=2), LOGITS, TARGETS),
    (NextToken(), RNG.normal(size=(4, 2, 3)), RNG.integers(0, 3, (4, 2))),
    (BinaryClassify(), LOGITS[:, :1], TARGETS % 2),
    (BinaryClassify(gamma=2.0, class_weights=(1.0, 2.0)), LOGITS[:, :1], TARGETS % 2),
    (Regress(huber=1.0), LOGITS, RNG.normal(size=(4, 3)).astype(np.float32)),
    (Regress(), LOGITS, RNG.normal(size=(4, 3)).astype(np.float32)),
]


@pytest.mark.parametrize(("task", "outputs", "targets"), JUDGED)
def test_rows_of_weight_0_change_no_bit(task, outputs, targets):
    weights = np.ones(targets.shape if isinstance(task, NextToken) else 4, np.float32)
    outputs = np.float32(outputs)
    garbage = 1e6 * outputs[::-1] + 1
    padded = batch_of(
        np.concatenate([targets, targets[::-1]]), np.concatenate([weights, 0 * weights])
    )
    expected = task.score(outputs, batch_of(targets, weights))
    assert task.score(np.concatenate([outputs, garbage]), padded) == expected
    kept, more = (
        {k: np.asarray(v) for k, v in task.gather(*given).items()}
        for given in (
            (outputs, batch_of(targets, weights)),
            (np.concatenate([outputs, garbage]), padded),
        )
    )
    if kept:
        assert task.gathered(more) == pytest.approx(task.gathered(kept), rel=1e-6)
        assert task.tables(more) == task.tables(kept)


@pytest.mark.parametrize(("task", "outputs", "targets"), JUDGED)
def test_a_batch_of_weight_0_has_loss_and_gradient_0(task, outputs, targets):
    batch = batch_of(targets, np.zeros(4, np.float32), inputs=np.float32(outputs))

    def loss(shift):
        return task(lambda x, rngs: x + shift, batch)[0]

    assert jax.value_and_grad(loss)(1.0) == (0, 0)


def test_the_loss_is_the_weighted_mean():
    batch = batch_of(TARGETS, WEIGHTS, inputs=LOGITS)
    loss, (metrics, carry) = Classify()(lambda x, rngs: x, batch)
    losses = -log_softmax(LOGITS)[np.arange(4), TARGETS]
    np.testing.assert_allclose(loss, np.average(losses, weights=WEIGHTS), rtol=1e-5)
    assert set(metrics) == {"loss", "accuracy"}
    assert carry is None


def test_bits_and_perplexity_follow_from_the_mean_loss():
    means = NextToken().summary({"loss": 2 * np.log(2), "accuracy": 0.5})
    assert means == pytest.approx(
        {"loss": 2 * np.log(2), "accuracy": 0.5, "bits_per_token": 2, "perplexity": 4}
    )
    characters = NextToken(unit="character").summary({"loss": np.log(2)})
    assert characters == pytest.approx(
        {"loss": np.log(2), "bits_per_character": 1, "perplexity": 2}
    )
    assert np.isfinite(NextToken().summary({"loss": 1e5})["perplexity"])
    assert Classify().summary({"loss": 1.0}) == {"loss": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classify(gamma=1.0, label_smoothing=0.1), "cannot be combined"),
        (lambda: Classify(class_weights=(1.0, 0.0)), "must be > 0"),
        (lambda: BinaryClassify(class_weights=(1.0, -1.0)), "must be > 0"),
    ],
)
def test_fields_that_do_not_go_together(make, message):
    with pytest.raises(UserError, match=message):
        make()


def shaped(*shape):
    return jax.ShapeDtypeStruct((8, *shape), jnp.float32)


CHECKS = [
    (Classify(), shaped(3), {"targets": np.asarray([0, 2])}, None),
    (Classify(), shaped(3), {"targets": np.asarray([0, 3])}, "run from 0 to 3, .* 3 logits"),
    (Classify(), shaped(3), {"targets": np.asarray([-1, 2])}, "run from -1 to 2, .* 3 logits"),
    (Classify(), shaped(3), {"targets": np.asarray([0.0, 1.0])}, "integers, not float64"),
    (Classify(), shaped(5, 3), {"targets": np.asarray([0, 2])}, r"\(5, 3\), and targets are \(\)"),
    (Classify(), shaped(3), {"targets": np.zeros((2, 5), int)}, r"targets are \(5,\)"),
    (Classify(top=3), shaped(3), {"targets": np.asarray([0, 2])}, "top = 3 of 3 classes"),
    (Classify(class_weights=(1.0,)), shaped(3), {"targets": np.asarray([0])}, "1 weights, .* 3"),
    (BinaryClassify(class_weights=(1.0,)), shaped(1), {"targets": np.asarray([0])}, "2 classes"),
    (NextToken(), shaped(5, 3), {"targets": np.zeros((2, 5), int)}, None),
    (NextToken(), shaped(5, 3), {"tokens": np.asarray([0, 1, 2])}, None),
    (NextToken(), shaped(5, 3), {"tokens": np.asarray([0, 1, 7])}, "run from 0 to 7, .* 3 logits"),
    (BinaryClassify(), shaped(1), {"targets": np.asarray([0, 1])}, None),
    (BinaryClassify(), shaped(1), {"targets": np.asarray([0.0, 0.0])}, None),
    (BinaryClassify(), shaped(2), {"targets": np.asarray([0, 1])}, r"reads 1 logit, .* \(2,\)"),
    (BinaryClassify(), shaped(5, 1), {"targets": np.asarray([0, 1])}, "reads 1 logit"),
    (BinaryClassify(), shaped(1), {"targets": np.asarray([0, 1, 2])}, "targets of 0 and 1"),
    (BinaryClassify(), shaped(1), {"targets": np.asarray([-1, 1])}, "targets of 0 and 1"),
    (BinaryClassify(), shaped(1), {"targets": np.asarray([[0], [1]])}, "one an example"),
    (Regress(), shaped(2), {"targets": np.ones((9, 2))}, None),
    (Regress(), shaped(1), {"targets": np.ones(9)}, r"outputs of \(1,\), and targets are \(\)"),
    (Regress(), shaped(5, 2), {"targets": np.ones((9, 5, 3))}, r"targets are \(5, 3\)"),
]


@pytest.mark.parametrize(("task", "outputs", "arrays", "message"), CHECKS)
def test_targets_that_do_not_fit_the_outputs_are_an_error_of_one_line(
    task, outputs, arrays, message
):
    if message is None:
        task.check(outputs, arrays)
    else:
        with pytest.raises(UserError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
            task.check(outputs, arrays)


IMAGES = RNG.normal(size=(4, 16, 16, 1)).astype(np.float32)
TOKENS = RNG.integers(0, 5, (4, 6)).astype(np.int32)
VECTORS = RNG.normal(size=(4, 6, 2)).astype(np.float32)
LENGTHS = {"lengths": np.asarray([6, 1, 3, 2], np.int32)}
LABELS = np.asarray([0, 1, 1, 0], np.int32)
DROPPED = {"dropout": 0.5}
PAIRS = {
    "mlp": (
        MLPConfig(features=2, sizes=(8, 1), **DROPPED),
        BinaryClassify(),
        batch_of(LABELS, WEIGHTS, inputs=VECTORS[:, 0]),
    ),
    "lenet": (
        LeNetConfig(image=(16, 16, 1), classes=3),
        Classify(label_smoothing=0.1),
        batch_of(LABELS, WEIGHTS, inputs=IMAGES),
    ),
    "cnn": (
        CNNConfig(image=(16, 16, 1), classes=3, channels=(2,), dense=8, **DROPPED),
        Classify(),
        batch_of(LABELS, WEIGHTS, inputs=IMAGES),
    ),
    "lstm language model": (
        LSTMConfig(vocab=5, width=4, outputs=5, **DROPPED),
        NextToken(),
        batch_of(TOKENS, np.ones((4, 6), np.float32), inputs=TOKENS),
    ),
    "lstm classifier": (
        LSTMConfig(features=2, width=4, outputs=3, head="sequence"),
        Classify(),
        batch_of(LABELS, WEIGHTS, inputs=VECTORS, **LENGTHS),
    ),
    "lstm regression": (
        LSTMConfig(features=2, width=4, outputs=2),
        Regress(),
        batch_of(VECTORS, WEIGHTS, inputs=VECTORS),
    ),
    "transformer": (
        TransformerConfig(vocab=5, context=6, layers=1, heads=2, width=8, **DROPPED),
        NextToken(),
        batch_of(TOKENS, np.ones((4, 6), np.float32), inputs=TOKENS),
    ),
}
every_pair = pytest.mark.parametrize(("config", "task", "batch"), PAIRS.values(), ids=PAIRS)


def made(config):
    """The module's graph and its parameters, a pure dict."""
    graph, params, rest = nnx.split(config.make(nnx.Rngs(params=jax.random.key(0))), nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    return graph, nnx.to_pure_dict(params)


@pytest.mark.usefixtures("strict_dtypes")
@every_pair
def test_outputs_metrics_and_gradients_are_float32_under_strict_promotion(config, task, batch):
    def outputs(key):
        graph, params = made(config)

        def loss(params):
            model = nnx.merge(graph, params, copy=True)
            model.train()
            loss, aux = task(model, batch, nnx.Rngs(dropout=key))
            model.eval()
            return loss, (aux, task.outputs(model, batch, None, None))

        return params, jax.value_and_grad(loss, has_aux=True)(params)

    found = jax.tree.leaves(jax.eval_shape(outputs, jax.random.key(1)))
    assert {a.dtype for a in found} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm language model", "transformer"])
def test_dropout_follows_its_key_in_training_and_is_off_in_evaluation(name):
    config, task, batch = PAIRS[name]
    graph, params = made(config)

    @jax.jit
    def train(key):
        model = nnx.merge(graph, params, copy=True)
        model.train()
        return task.outputs(model, batch, nnx.Rngs(dropout=key), None)[0]

    @jax.jit
    def evaluate(model):
        model.eval()
        return task.outputs(model, batch, None, None)[0]

    one, other = jax.random.split(jax.random.key(1))
    first, second, again = train(one), train(other), train(one)
    bare = nnx.graphdef(dataclasses.replace(config, dropout=0.0).make(nnx.Rngs(params=one)))
    evaluated = evaluate(nnx.merge(graph, params))
    assert np.array_equal(evaluated, evaluate(nnx.merge(bare, params)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, evaluated)


def test_lengths_reach_the_model():
    config, task, batch = PAIRS["lstm classifier"]
    model = config.make(nnx.Rngs(params=jax.random.key(0)))
    whole = {k: v for k, v in batch.items() if k != "lengths"}
    outputs = [task.outputs(model, b, None, None)[0] for b in (batch, whole)]
    same = np.all(np.isclose(*outputs, rtol=1e-5, atol=1e-6), axis=-1)
    assert same.tolist() == (batch["lengths"] == 6).tolist()


def test_bits_and_perplexity_leave_label_smoothing_out():
    logits = jnp.array([[[20.0, 0, 0, 0]]])
    batch = {"targets": jnp.array([[0]]), "weights": jnp.ones((1, 1))}
    task = NextToken(label_smoothing=0.1)
    means = {k: float(v.total / v.weight) for k, v in task.score(logits, batch).items()}
    found = task.summary(means)
    assert found["loss"] == pytest.approx(0.1 * 20 * 3 / 4, rel=1e-4)
    assert found["bits_per_token"] == pytest.approx(0, abs=1e-6)
    assert found["perplexity"] == pytest.approx(1)
