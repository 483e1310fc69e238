"""Optimizers at equal model FLOPs: the loss after one budget, all learning rates tuned alike."""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from research import command, compute, run, train
from research import experiment as experiments
from research.bench.methods import PLAIN, Method, planned
from research.experiment import Experiment
from research.setup import prepare

CONFIGS = {
    "cnn": "configs/cnn_digits.py",
    "lstm": "configs/lstm_text.py",
    "transformer": "configs/transformer_text.py",
}
SMALL: dict[str, dict[str, dict[str, Any]]] = {
    "cnn": {"model": {"channels": (8, 16), "dense": 64}, "task": {"label_smoothing": 0.0}},
    "lstm": {"model": {"features": 32, "width": 64}, "data": {"length": 32}},
    "transformer": {
        "model": {"context": 64, "layers": 2, "heads": 2, "width": 64, "feed_forward": 172},
        "data": {"length": 64},
    },
}
"""What is changed in a config, so that a run takes seconds and its loss is plain cross-entropy."""
METRIC = {
    "cnn": "validation loss (nats an image)",
    "lstm": "validation loss (nats a character)",
    "transformer": "validation loss (nats a character)",
}
GRID = (-1, 0, 1)
"""Learning rates tried first, in half powers of ten from the customary one."""
FURTHER = 5
"""Rates tried beyond the grid at most, while the best one is on its edge."""
SEARCHED, SEEDS = 0, (1, 2, 3)
"""The seed that the rate is chosen by, and those of the figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One optimizer on one model. A loss is None where the run diverged."""

    model: str
    optimizer: str
    budget: int
    """Model FLOPs."""
    flops_per_step: int
    """Model FLOPs."""
    steps: int
    """As many as the budget holds; 0: one step exceeds it, and nothing was trained."""
    batch_size: int
    rate: float | None = None
    """The peak learning rate with the least validation loss."""
    edge: bool = False
    """Whether the search ended with that rate still the least or the greatest it had tried."""
    tried: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Validation loss by learning rate, of the seed that the rate is chosen by; nats."""
    losses: tuple[float | None, ...] = ()
    """Validation loss of each seed at that rate; nats an example or a character."""
    accuracies: tuple[float, ...] = ()
    """Test accuracy of each seed, a fraction, where the config has a target on a test split."""

    @property
    def mean(self) -> float | None:
        """Of the seeds' losses; None where one diverged, or none was trained."""
        found = [loss for loss in self.losses if loss is not None]
        return statistics.fmean(found) if found and len(found) == len(self.losses) else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the seeds' losses (n - 1)."""
        found = [loss for loss in self.losses if loss is not None]
        return None if self.mean is None else statistics.stdev(found)

    @property
    def note(self) -> str:
        """Why there is no mean; empty where there is one."""
        if not self.steps:
            return f"unavailable: one step costs {self.flops_per_step / self.budget:.2f} budgets"
        gone = self.losses.count(None)
        return f"diverged: {gone} of {len(self.losses)} seeds" if gone else ""

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        return found | {"mean": self.mean, "deviation": self.deviation, "note": self.note}


def base(model: str, steps: int) -> Experiment:
    """A model's config made small, with the updates of plain SGD that are the budget."""
    config = command.load(CONFIGS[model])
    parts = {
        part: dataclasses.replace(getattr(config, part), **fields)
        for part, fields in SMALL[model].items()
    }
    return dataclasses.replace(config, **parts, steps=steps, eval_every=None, save_every=None)


def flops(experiment: Experiment) -> int:
    """Model FLOPs of a step; nothing is compiled."""
    setup = prepare(experiment, jax.local_devices()[:1])
    return compute.count(setup.step().trace(*setup.abstract_example())).model_flops


def search(loss: Callable[[int], float]) -> dict[int, float]:
    """Losses by half powers of ten: the grid, and on from its edge while that is the best.

    Of equal losses, as where all diverge, the smaller rate counts as the better.
    """
    tried = {k: loss(k) for k in GRID}
    for _ in range(FURTHER):
        k = best(tried)
        if min(tried) < k < max(tried):
            break
        k += 1 if k == max(tried) else -1
        tried[k] = loss(k)
    return tried


def best(tried: Mapping[int, float]) -> int:
    return min(tried, key=lambda k: (tried[k], k))


def trained(experiment: Experiment, workdir: pathlib.Path) -> run.Summary | None:
    """A finished run, read back where it has been trained before; None where its loss diverged."""
    mark, config = workdir / "diverged.json", workdir / "config.json"
    # A run that diverged has no checkpoint, by which train would know it for the same run.
    if mark.exists() and config.read_text() == experiments.dumps(experiment):
        return None
    try:
        return train.train(prepare(experiment, jax.local_devices()[:1]), workdir, quiet=True)
    except FloatingPointError as error:
        run.write(workdir, mark.name, json.dumps({"reason": str(error)}) + "\n")
        return None


def measure(
    model: str,
    base: Experiment,
    workdir: pathlib.Path,
    methods: Mapping[str, Method],
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Row]:
    """A row for each method, as it is found. Runs are kept in folders of `workdir`.

    base: its steps, of plain SGD at its batch size, are the budget. say: told of each run.
    """
    budget = base.steps * flops(planned(base, PLAIN, PLAIN.rate, base.steps, SEARCHED))
    for name, method in methods.items():
        row = affordable(model, name, base, method, budget)
        if row.steps:
            folder = workdir / model / name.replace(", ", "_").replace(" ", "_")
            row = _tuned(row, functools.partial(planned, base, method), method.rate, folder, say)
        yield row


def affordable(model: str, name: str, base: Experiment, method: Method, budget: int) -> Row:
    """A row without a result: what a step of the method costs, and how many the budget holds."""
    example = planned(base, method, method.rate, base.steps, SEARCHED)
    cost = flops(example)
    return Row(
        model=model,
        optimizer=name,
        budget=budget,
        flops_per_step=cost,
        steps=budget // cost,
        batch_size=example.batch_size or len(base.data.load()["train"]),
    )


def _tuned(
    row: Row,
    make: Callable[[float, int, int], Experiment],
    customary: float,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> Row:
    """The row with its rate searched, and the losses of the seeds at that rate."""

    def rate(k: int) -> float:
        return float(f"{customary * 10 ** (k / 2):.2g}")

    def at(k: int, seed: int) -> run.Summary | None:
        start, where = time.perf_counter(), folder / f"rate_{rate(k):g}_seed_{seed}"
        found = trained(make(rate(k), row.steps, seed), where)
        loss = "diverged" if found is None else f"loss {_loss(found):.4f}"
        seconds = time.perf_counter() - start
        what = f"{row.model}  {row.optimizer}  rate {rate(k):g}  seed {seed}"
        say(f"{what}  {row.steps} steps  {loss}  {seconds:.1f} s")
        return found

    tried = search(lambda k: _loss(at(k, SEARCHED)))
    k = best(tried)
    runs = [at(k, seed) for seed in SEEDS]
    tests = [found.metrics.get("test", {}) for found in runs if found is not None]
    return dataclasses.replace(
        row,
        rate=rate(k),
        edge=k in (min(tried), max(tried)),
        tried={f"{rate(k):g}": _finite(tried[k]) for k in sorted(tried)},
        losses=tuple(_finite(_loss(found)) for found in runs),
        accuracies=tuple(test["accuracy"] for test in tests if "accuracy" in test),
    )


def table(rows: Sequence[Row]) -> str:
    """Rows of one model, the least mean loss first, then those without a mean."""
    first = rows[0]
    tested = any(row.accuracies for row in rows)
    head = f"{'optimizer':22}{'batch':>7}{'steps':>8}{'FLOPs/step':>13}{'rate':>10}{'loss':>10}"
    lines = [
        f"{first.model}: validation loss after {first.budget:.4g} model FLOPs",
        "",
        head + f"{'deviation':>12}" + (f"{'test accuracy':>16}" if tested else ""),
    ]
    for row in ranked(rows):
        line = f"{row.optimizer:22}{row.batch_size:7,}{row.steps:8,}{row.flops_per_step:13.4g}"
        line += " " * 10 if row.rate is None else f"{f'{row.rate:g}' + '*' * row.edge:>10}"
        if row.mean is None:
            lines.append(f"{line}  {row.note}")
            continue
        line += f"{row.mean:10.4f}{row.deviation:12.4f}"
        lines.append(line + (f"{statistics.fmean(row.accuracies):16.4f}" if tested else ""))
    if any(row.edge for row in rows):
        lines.append("* the least or the greatest rate tried: the best may lie beyond")
    return "\n".join(lines)


def panels(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Any]]:
    """Rows by model as `plot.dots` takes them."""
    return {
        f"{model}: {METRIC[model]}": [(row.optimizer, row.losses, row.note) for row in ranked(of)]
        for model, of in rows.items()
    }


def ranked(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: math.inf if row.mean is None else row.mean)


def _loss(found: run.Summary | None) -> float:
    return math.inf if found is None else found.metrics["validation"]["loss"]


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
