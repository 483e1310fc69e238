"""Baselines of tables, by scikit-learn, on the very rows that a config trains and tests on."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from research import UserError
from research.data.splits import Examples
from research.experiment import Experiment

Accuracies = dict[str, dict[str, float]]
"""By model, and then by split."""


def divided(experiment: Experiment, splits: int) -> Iterator[Experiment]:
    """The experiment on its own split, or with data.split from 0 to splits - 1."""
    if splits == 1:
        yield experiment
        return
    data: Any = experiment.data
    if not hasattr(data, "split"):
        raise UserError(f"{type(data).__name__} has no field split: give --splits 1")
    for k in range(splits):
        yield dataclasses.replace(experiment, data=dataclasses.replace(data, split=k))


def accuracies(data: Mapping[str, Any]) -> Accuracies:
    """Fits each baseline to the training rows, and scores it on every other split.

    Raises UserError where inputs are no floating point, or targets no classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.tree import DecisionTreeClassifier

    rows = {name: _rows(name, split) for name, split in data.items()}
    inputs, targets = rows.pop("train")
    majority = np.argmax(np.bincount(targets))
    found = {"majority class": {n: float(np.mean(y == majority)) for n, (_, y) in rows.items()}}
    models = {
        "one input, one threshold": DecisionTreeClassifier(max_depth=1, random_state=0),
        "logistic regression": LogisticRegression(max_iter=1000),
    }
    for name, model in models.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                model.fit(inputs, targets)
            except (ValueError, ConvergenceWarning) as error:
                raise UserError(f"{name}: {str(error).splitlines()[0]}") from None
        found[name] = {n: float(model.score(x, y)) for n, (x, y) in rows.items()}
    return found


def _rows(name: str, split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, F] and targets [B] of the rows that are not bad."""
    held = split.rows if isinstance(split, Examples) else {}
    if not {"inputs", "targets"} <= held.keys() or "lengths" in held:
        raise UserError("linear reads examples with inputs and targets alone")
    inputs, targets = held["inputs"], held["targets"]
    if not np.issubdtype(inputs.dtype, np.floating):
        raise UserError(f"linear needs inputs of floating point, not {inputs.dtype}")
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise UserError("linear needs one class an example")
    kept = ~held["bad"] if "bad" in held else slice(None)
    return inputs[kept].reshape(-1, int(np.prod(inputs.shape[1:]))), targets[kept]


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Accuracies of each model, by split, over divisions of the data."""
    names = [name for name in next(iter(found.values()))[0] if name != "train"]
    width = max(map(len, found)) + 2
    head = "".join(f"{name}: mean".rjust(20) + f"{'sd':>6}{'range':>14}" for name in names)
    lines = [" " * width + head]
    for model, scores in found.items():
        line = model.ljust(width)
        for name in names:
            values = 100 * np.array([score[name] for score in scores if name in score])
            if not len(values):
                line += " " * 40
                continue
            line += f"{np.mean(values):20.1f}"
            if len(values) > 1:
                line += f"{np.std(values, ddof=1):6.1f}{values.min():8.1f}-{values.max():<5.1f}"
            else:
                line += " " * 20
        lines.append(line.rstrip())
    return "\n".join(lines)
