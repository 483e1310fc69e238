"""Gathered metrics against scikit-learn and loops."""

import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, r2_score, roc_auc_score

from research import metrics

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize("seed", range(5))
def test_auc_with_ties_and_weights_is_scikit_learns(seed, decimals):
    rng = np.random.default_rng(seed)
    positive = rng.integers(2, size=60)
    scores = np.round(rng.normal(size=60) + positive, decimals).astype(np.float32)
    weights = rng.integers(3, size=60).astype(np.float32)
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    assert metrics.auc(scores, positive, weights) == pytest.approx(expected, abs=1e-12)
    counted = weights > 0
    garbage = np.where(counted, scores, 1e9)
    assert metrics.auc(garbage, positive, weights) == pytest.approx(expected, abs=1e-12)


def test_auc_of_equal_scores_is_a_half_and_of_one_class_undefined():
    ones = np.ones(4, np.float32)
    assert metrics.auc(ones, np.asarray([0, 1, 1, 0]), ones) == 0.5
    assert math.isnan(metrics.auc(ones, np.ones(4), ones))
    assert math.isnan(metrics.auc(ones, np.asarray([0, 1, 1, 0]), 0 * ones))
    assert math.isnan(metrics.auc(np.nan * ones, np.asarray([0, 1, 1, 0]), ones))


def ece(confidence, right, weights):
    """Guo et al. 2017, equation 3, bin by bin."""
    found = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = [i for i, c in enumerate(confidence) if low < c <= high]
        if n := sum(weights[i] for i in inside):
            accuracy = sum(weights[i] * right[i] for i in inside) / n
            sure = sum(weights[i] * float(confidence[i]) for i in inside) / n
            found += n / sum(weights) * abs(accuracy - sure)
    return found


def test_calibration_error_is_that_of_a_loop():
    confidence = RNG.uniform(0.05, 1, 200).astype(np.float32)
    confidence[:3] = 1.0
    confidence[3:18] = np.linspace(0, 1, 16)[1:]  # edges
    right, weights = RNG.integers(2, size=200), RNG.integers(3, size=200).astype(np.float32)
    expected = ece(confidence, right, weights)
    assert metrics.calibration_error(confidence, right, weights) == pytest.approx(expected)
    assert metrics.calibration_error(np.float32([1, 1]), np.ones(2), np.ones(2)) == 0
    assert math.isnan(metrics.calibration_error(confidence, right, 0 * weights))


def test_confusion_counts_rows_of_any_weight_and_classes_that_never_come():
    targets, predicted = RNG.integers(4, size=(2, 90))
    weights = RNG.integers(3, size=90) / 2
    counted = weights > 0
    expected = confusion_matrix(targets[counted], predicted[counted], labels=range(6))
    assert np.array_equal(metrics.confusion(targets, predicted, weights, 6), expected)


def sums(y, outputs, weights):
    w = weights[:, None]
    about = y[0]
    squares = (w * (y - about) ** 2).sum(0), (w * (y - outputs) ** 2).sum(0)
    return w.sum(), about, (w * (y - about)).sum(0), *squares


@pytest.mark.parametrize("far", [0.0, 1e4])
@pytest.mark.parametrize("batches", [1, 4, 30])
def test_r2_is_scikit_learns_however_far_targets_are_from_zero(far, batches):
    y = (far + RNG.normal(size=(30, 2))).astype(np.float32)
    outputs = (y + 0.3 * RNG.normal(size=y.shape)).astype(np.float32)
    weights = RNG.integers(3, size=30).astype(np.float32)
    parts = (np.array_split(a, batches) for a in (y, outputs, weights))
    found = [sums(*part) for part in zip(*parts, strict=True)]
    joined = [np.stack(each) for each in zip(*found, strict=True)]
    expected = r2_score(np.float64(y), outputs, sample_weight=weights)
    assert metrics.r2(*joined) == pytest.approx(expected, rel=1e-6)


def test_r2_of_constant_targets_or_none_is_undefined():
    one = np.ones((1, 1))
    assert math.isnan(metrics.r2(np.ones(1), one, 0 * one, 0 * one, one))
    assert math.isnan(metrics.r2(np.zeros(1), one, one, one, one))
