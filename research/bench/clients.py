"""Clients that train by themselves: the loss at equal samples, by how seldom they meet."""

import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from research import UserError, train
from research.data.shares import Shares
from research.experiment import Experiment
from research.setup import prepare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Means over seeds."""

    alpha: float | None
    """Of `Shares`; None: shares are alike."""
    steps: int
    """Of a client between two meetings."""
    loss: float
    """Of the split that the experiment evaluates, after the last step."""
    spread: float
    """The largest loss of a seed less the least."""
    accuracy: float | None
    sent: int
    """Bytes that a client adds to the sum of all, a step of its own: its parameters' and other
    variables', over `steps`."""


def measure(
    base: Experiment, steps: Sequence[int], seeds: Sequence[int], say: Callable[[str], None]
) -> Iterator[Row]:
    """Shares that are alike, and then the experiment's own, all on as many samples.

    Raises UserError where the experiment is not of clients with shares, or its samples do not
    divide.
    """
    data: Any = base.data
    if not base.local.active or not isinstance(data, Shares):
        raise UserError("benchmark clients: needs a config with local.clients and shares of data")
    for flag, given in (("--every", steps), ("--seeds", seeds)):
        if not given:
            raise UserError(f"{flag} needs at least one number")
    rows = (base.batch_size or 0) // base.local.steps
    total = base.steps * base.local.steps
    if bad := [n for n in steps if n < 1 or total % n]:
        raise UserError(f"--every {bad[0]} does not divide the {total} steps of a client")
    for alpha in dict.fromkeys((None, data.alpha)):
        for n in steps:
            e = dataclasses.replace(
                base,
                data=dataclasses.replace(data, alpha=alpha),
                local=dataclasses.replace(base.local, steps=n),
                batch_size=rows * n,
                steps=total // n,
                eval_every=None,
                target=None,
            )
            yield _row(e, alpha, seeds, say)


def _row(
    e: Experiment, alpha: float | None, seeds: Sequence[int], say: Callable[[str], None]
) -> Row:
    losses, accuracies = [], []
    for seed in seeds:
        say(f"alpha {alpha}, {e.local.steps} steps, seed {seed}")
        setup = prepare(dataclasses.replace(e, seed=seed))
        with tempfile.TemporaryDirectory() as folder:
            found = train.train(setup, pathlib.Path(folder, "run"), quiet=True)
        metrics = found.metrics[e.eval_split]
        losses.append(metrics["loss"])
        accuracies += [metrics["accuracy"]] if "accuracy" in metrics else []
    leaves = jax.tree.leaves((setup.abstract.params, setup.abstract.model_state))
    sent = sum(x.size * x.dtype.itemsize for x in leaves)
    return Row(
        alpha=alpha,
        steps=e.local.steps,
        loss=statistics.mean(losses),
        spread=max(losses) - min(losses),
        accuracy=statistics.mean(accuracies) if accuracies else None,
        sent=sent // e.local.steps,
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'shares':14}{'steps':>6}{'loss':>9}{'spread':>9}{'accuracy':>10}{'bytes a step':>14}"
    ]
    for row in rows:
        shares = "alike" if row.alpha is None else f"alpha {row.alpha:g}"
        accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}%"
        lines.append(
            f"{shares:14}{row.steps:6}{row.loss:9.4f}{row.spread:9.4f}{accuracy:>10}{row.sent:14,}"
        )
    return "\n".join(lines)
