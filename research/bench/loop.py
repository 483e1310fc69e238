"""What the training loop adds to a bare jitted step."""

import dataclasses
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from research import UserError, record
from research.experiment import EarlyStop, Experiment
from research.setup import Setup, prepare
from research.train import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overhead:
    """Medians over rounds, in which both were measured one after the other."""

    bare_ms: float
    """Of one step, batches already on the device, nothing fetched until the end."""
    loop_ms: float
    """Of one step in `train`: reading, placing, fetching and logging included."""
    ratio: float
    """Of the two, within a round."""
    spread: tuple[float, float]
    """The least and the greatest ratio of a round."""


def overhead(experiment: Experiment, rounds: int) -> Overhead:
    """Times the experiment's steps both ways, `rounds` times in turn.

    A time is the median over the chunks of `log_every` steps; nothing is evaluated or saved.
    """
    chunk = experiment.log_every
    if rounds < 1 or experiment.steps < 2 * chunk:
        raise UserError(f"loop needs a round, and steps of at least twice log_every = {chunk}")
    setup = prepare(
        dataclasses.replace(
            experiment,
            target=None,
            eval_every=None,
            save_every=None,
            early_stop=EarlyStop(),
            tracker=None,
        )
    )
    step = setup.step().lower(*setup.example()).compile()
    pairs = [(bare(setup, step, experiment.steps, chunk), _loop(setup)) for _ in range(rounds)]
    ratios = [within / alone for alone, within in pairs]
    bare_ms, loop_ms = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    return Overhead(
        bare_ms=bare_ms,
        loop_ms=loop_ms,
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
    )


def bare(setup: Setup, step: Any, steps: int, chunk: int) -> float:
    """Seconds of a compiled step by itself: the median over chunks of steps, each waited for."""
    return statistics.median(itertools.islice(chunks(setup, step, chunk), steps // chunk))


def chunks(setup: Setup, step: Any, chunk: int) -> Iterator[float]:
    """Seconds of a compiled step by itself, without end: each a mean over a chunk of steps that is
    waited for. Batches are on the device already."""
    state = setup.initial()
    batches = itertools.cycle(list(setup.feed(0, 4)))
    while True:
        start = time.perf_counter()
        for batch in itertools.islice(batches, chunk):
            state, metrics = step(state, batch, setup.root)
        jax.block_until_ready((state, metrics))
        yield (time.perf_counter() - start) / chunk


def _loop(setup: Setup) -> float:
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        train(setup, workdir, quiet=True)
        rows = [row for row in record.read_metrics(workdir) if row["split"] == "train"]
    steps, seconds = (np.array([0, *(row[k] for row in rows)]) for k in ("step", "seconds"))
    return float(np.median(np.diff(seconds) / np.diff(steps)))
