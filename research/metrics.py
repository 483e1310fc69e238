"""Metrics that no mean over batches gives, from what was gathered over a split; NumPy, float64.

N examples, K classes, D outputs, n batches. One that a split leaves undefined is NaN.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BINS = 15
"""Equal-width bins of the calibration error, as in Guo et al. 2017."""


def auc(scores_N: Array, positive_N: Array, weights_N: Array) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie half.

    Undefined where either kind has no weight.
    """
    _, rank_N = np.unique(scores_N, return_inverse=True)
    positive = np.bincount(rank_N, weights_N * (positive_N == 1))
    negative = np.bincount(rank_N, weights_N * (positive_N != 1))
    pairs = positive.sum() * negative.sum()
    if not pairs > 0 or np.isnan(scores_N).any():
        return math.nan
    below = np.cumsum(negative) - negative
    return float(positive @ (below + negative / 2) / pairs)


def calibration_error(confidence_N: Array, right_N: Array, weights_N: Array) -> float:
    """Mean over bins of |accuracy - confidence|, weighted by the examples in them."""
    edges = np.linspace(0, 1, BINS + 1)
    # A bin holds its upper edge, not its lower one.
    bin_N = np.searchsorted(edges[1:-1], confidence_N, side="left")
    gap = np.bincount(bin_N, weights_N * (right_N - confidence_N.astype(np.float64)))
    total = weights_N.sum(dtype=np.float64)
    return float(np.abs(gap).sum() / total) if total > 0 else math.nan


def confusion(targets_N: Array, predicted_N: Array, weights_N: Array, classes: int) -> Array:
    """Counts [target, predicted] of the examples that have any weight."""
    counted = weights_N > 0
    cell_N = targets_N[counted].astype(np.int64) * classes + predicted_N[counted]
    return np.bincount(cell_N, minlength=classes**2).reshape(classes, classes)


def r2(
    weight_n: Array, about_nD: Array, first_nD: Array, square_nD: Array, residual_nD: Array
) -> float:
    """Coefficient of determination, the mean over outputs, from each batch's sums.

    first, square: sums over targets y of y - about and of its square, where `about` is one of the
    batch's targets: about zero they would cancel where targets are far from it. residual: the sum
    of squared errors. Undefined where an output's targets are all the same.
    """
    weight_n1 = weight_n.astype(np.float64)[:, None]
    if not weight_n1.sum() > 0:
        return math.nan
    rest_nD = first_nD / np.maximum(weight_n1, 1e-9)
    mean_nD = about_nD + rest_nD
    mean_D = np.sum(weight_n1 * mean_nD, axis=0) / weight_n1.sum()
    # Of one batch and between batches, as in Chan et al. 1983.
    total_D = np.sum(square_nD - weight_n1 * rest_nD**2 + weight_n1 * (mean_nD - mean_D) ** 2, 0)
    residual_D = residual_nD.sum(0, dtype=np.float64)
    return float(np.mean(1 - residual_D / total_D)) if (total_D > 0).all() else math.nan
