"""Mixup and CutMix against loops over rows and pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from scipy import stats

from research import UserError, compute, mixing, parallel
from research.setup import prepare
from research.tasks import Classify

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 7, 9, 2)).astype(np.float32)
ONES = np.ones(6, np.float32)


def keys(n):
    return jax.random.split(jax.random.key(0), n)


def test_mixup_adds_pairs_in_one_share_of_a_batch():
    for key in keys(5):
        x, share = mixing.mixed(IMAGES, ONES, key, 0.4, 0.0)
        assert len(set(np.asarray(share).tolist())) == 1
        for i in range(6):
            expected = share[i] * IMAGES[i] + (1 - share[i]) * IMAGES[5 - i]
            np.testing.assert_allclose(x[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.5), (1.0, 1.0)])
def test_a_row_of_weight_0_is_never_mixed_in(mixup, cutmix):
    weights = np.float32([1, 0, 1, 1, 1, 0])
    garbage = np.where((weights == 0).reshape(-1, 1, 1, 1), np.float32(np.nan), IMAGES)
    for key in keys(5):
        x, share = mixing.mixed(garbage, weights, key, mixup, cutmix)
        assert share[0] == share[4] == 1
        assert np.array_equal(x[0], IMAGES[0])
        assert np.array_equal(x[4], IMAGES[4])
        assert np.isfinite(x[2:4]).all()


def test_cutmix_pastes_a_box_and_its_area_is_the_partners_share():
    boxes = set()
    for key in keys(30):
        x, share = mixing.mixed(IMAGES, ONES, key, 0.0, 1.0)
        pasted = np.all(np.asarray(x) == IMAGES[::-1], axis=-1)
        kept = np.all(np.asarray(x) == IMAGES, axis=-1)
        assert np.array_equal(pasted, ~kept)
        assert np.array_equal(pasted, np.repeat(pasted[:1], 6, axis=0))
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert np.array_equal(pasted[0], rows[:, None] & columns[None])
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2  # in one piece
        np.testing.assert_allclose(share, 1 - pasted[0].mean(), rtol=1e-6)
        boxes.add((tuple(rows), tuple(columns)))
    assert len(boxes) > 15


@pytest.mark.parametrize("a", [0.2, 1.0, 3.0])
def test_shares_are_of_a_beta_distribution(a):
    draw = jax.jit(jax.vmap(lambda key: mixing.mixed(IMAGES, ONES, key, a, 0.0)[1][0]))
    shares = np.asarray(draw(keys(4000)))
    # Kolmogorov and Smirnov's distance: a share's own distribution stays below this in 99.9%.
    distance = stats.kstest(np.float64(shares), stats.beta(a, a).cdf).statistic
    assert distance < 1.95 / 4000**0.5


def test_mixing_is_counted_to_the_last_flop():
    setup = prepare(tiny.resnet(task=Classify(mixup=0.2, cutmix=1.0)), tiny.ONE)
    assert compute.report(setup.step().trace(*setup.abstract_example())).program.exact


def test_with_both_each_batch_is_mixed_by_one_of_them():
    x, share = jax.vmap(lambda key: mixing.mixed(IMAGES, ONES, key, 1.0, 1.0))(keys(40))
    cut = (np.asarray(x) == IMAGES) | (np.asarray(x) == IMAGES[::-1])
    cut = cut.all(axis=(1, 2, 3, 4))
    assert 8 < cut.sum() < 32
    share = np.asarray(share)[..., None, None, None]
    added = share * IMAGES + (1 - share) * IMAGES[::-1]
    np.testing.assert_allclose(np.asarray(x)[~cut], added[~cut], rtol=1e-4, atol=1e-5)


def test_the_loss_scores_both_targets_by_their_shares():
    logits, targets = RNG.normal(size=(6, 3)).astype(np.float32), np.asarray([0, 1, 2, 2, 1, 0])
    weights = np.float32([1, 2, 0, 1, 1, 1])
    batch = {"inputs": logits, "targets": targets, "weights": weights}
    task = Classify(mixup=1.0)
    loss, (metrics, _) = task(lambda x, rngs: x, batch, nnx.Rngs(dropout=jax.random.key(3)))
    x, share = mixing.mixed(logits, weights, nnx.Rngs(dropout=jax.random.key(3)).dropout(), 1.0, 0)
    log_p = np.asarray(jax.nn.log_softmax(x))
    rows = np.arange(6)
    losses = -(share * log_p[rows, targets] + (1 - share) * log_p[rows, targets[::-1]])
    np.testing.assert_allclose(loss, np.average(losses, weights=weights), rtol=1e-5)
    assert set(metrics) == {"loss", "accuracy"}
    np.testing.assert_allclose(metrics["accuracy"].weight, weights.sum(), rtol=1e-6)


def test_evaluation_mixes_nothing():
    batch = {"inputs": jnp.eye(3), "targets": np.arange(3), "weights": np.ones(3, np.float32)}
    plain, mixed = (task(lambda x, rngs: x, batch) for task in (Classify(), Classify(mixup=1.0)))
    assert plain == mixed


def test_steps_draw_anew_and_devices_agree():
    experiment = tiny.mlp(task=Classify(mixup=1.0), optimizer=tiny.sgd(0.0))
    losses = []
    for devices in (tiny.ONE, jax.devices()):
        setup = prepare(experiment, devices)
        step, state = setup.step(), setup.initial()
        losses.append([])
        for _ in range(3):
            batch = parallel.put(setup.splits["train"].batch(0, 16, 0), setup.mesh)
            state, metrics = step(state, batch, setup.root)
            losses[-1].append(float(metrics["loss"].mean()))
    assert len(set(losses[0])) == 3
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "inputs", "message"),
    [
        (
            Classify(mixup=1.0),
            np.ones((4, 5), np.int32),
            "mixup needs images, or other inputs of floating",
        ),
        (Classify(cutmix=1.0), np.ones((4, 5), np.float32), "cutmix needs images"),
        (Classify(cutmix=1.0), np.ones((4, 5, 5), np.float32), None),
    ],
)
def test_what_cannot_be_mixed_is_said(task, inputs, message):
    outputs = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    arrays = {"inputs": inputs, "targets": np.arange(4) % 3}
    if message is None:
        task.check(outputs, arrays)
    else:
        with pytest.raises(UserError, match=message):
            task.check(outputs, arrays)
