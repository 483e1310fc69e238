"""What the making of batches costs a run, and a plain PyTorch DataLoader beside it."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from research import UserError
from research.data import splits
from research.data.tfds import TFDS
from research.experiment import Experiment
from research.setup import Setup, prepare
from research.tasks import Classify, pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """Medians over rounds, in which all was measured one after the other."""

    supply: float
    """Examples a second that are made and put on the device while nothing else runs."""
    megabytes: float
    """10^6 bytes a second of the same."""
    appetite: float
    """Examples a second that steps take whose batches are on the device already."""
    waiting: float
    """Share of a step's time that is spent waiting: what steps take longer where each batch is
    made, over what they take then, of all rounds together. Below 0 where that is less than the
    noise."""
    error: float
    """Its standard error, by a bootstrap over rounds."""
    rounds: int


def measure(
    experiment: Experiment,
    seconds: float = 30.0,
    chunk: float = 0.1,
    devices: Sequence[jax.Device] | None = None,
) -> Input:
    """Times steps with and without the making of batches, in turn, for so many seconds.

    chunk: seconds of either side of a round, which has 5 steps at least; short, so that a machine
    that is now slower and now faster is the same for both. Which is first changes from round to
    round. devices: None: all there are.
    """
    if seconds <= 0:
        raise UserError(f"input needs time, not {seconds} seconds")
    setup = prepare(experiment, devices)
    return of_step(setup, setup.step().lower(*setup.example()).compile(), seconds, chunk)


def of_step(setup: Setup, step: Any, seconds: float, chunk: float = 0.1) -> Input:
    """The same, of an experiment's compiled step."""
    state = setup.initial()
    fixed = itertools.cycle(list(setup.feed(0, 4)))
    state, _ = _steps(setup, step, state, fixed, 3)
    state, once = _steps(setup, step, state, fixed, 3)
    count = max(5, round(chunk / once))
    rounds = max(3, round(seconds / (2 * count * once)))
    # What is made at once is made whole, and charged to steps that have all of it to take.
    fed, made = setup.feed(0, 1 << 30), setup.feed(0, 1 << 30)
    whole = -(-count // setup.together) * setup.together
    found = []
    for i in range(rounds):
        times = {}
        for feeding in (i % 2 == 0, i % 2 == 1):
            _use_up(setup, fed)
            source = fed if feeding else fixed
            state, times[feeding] = _steps(setup, step, state, source, count)
        _use_up(setup, made)
        start = time.perf_counter()
        for batch in itertools.islice(made, whole):
            jax.block_until_ready(batch)
        found.append((times[False], times[True], (time.perf_counter() - start) / whole))
    alone, with_making, making = np.array(found).T
    batch = setup.splits["train"].batch(0, setup.batch_size, setup.experiment.seed)
    size = sum(array.nbytes for array in batch.values())
    drawn = np.random.default_rng(0).integers(rounds, size=(1000, rounds))
    shares = 1 - alone[drawn].sum(1) / with_making[drawn].sum(1)
    return Input(
        supply=setup.batch_size / float(np.median(making)),
        megabytes=size / float(np.median(making)) / 1e6,
        appetite=setup.batch_size / float(np.median(alone)),
        waiting=float(1 - alone.sum() / with_making.sum()),
        error=float(shares.std()),
        rounds=rounds,
    )


def _use_up(setup: Setup, batches: Iterator[Any]) -> None:
    """Takes what was made while something else was timed."""
    if setup.together == 1:
        for _ in range(splits.ahead(setup.splits["train"].threads)):
            next(batches)


def _steps(
    setup: Setup, step: Any, state: Any, batches: Iterator[Any], count: int
) -> tuple[Any, float]:
    """The state after `count` steps, and the seconds of one."""
    start = time.perf_counter()
    for _ in range(count):
        state, metrics = step(state, next(batches), setup.root)
    jax.block_until_ready((state, metrics))
    return state, (time.perf_counter() - start) / count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaders:
    """Examples a second, decoded, augmented and ready for a model: medians over rounds."""

    kept: float
    """Of Ergon, from the decoded cache, augmented in a jitted program."""
    read: float
    """Of Ergon, decoding each image anew."""
    torch: float
    """Of PyTorch's DataLoader, which decodes each anew."""


AHEAD = 40
"""Batches: more than two workers have ready, of PyTorch's 2 each, of ours some 10 each."""


def loaders(
    experiment: Experiment,
    rounds: int = 5,
    batches: int = 100,
    workers: int = 2,
    rest: float = 3.0,
) -> Loaders:
    """Ergon's reading of a config's images beside a DataLoader's, on the same files.

    batches: of a round. workers: the DataLoader's processes. rest: seconds before each is timed,
    in which all make what they make ahead; it is taken before the time begins.
    """
    data, task = experiment.data, experiment.task
    if not (isinstance(data, TFDS) and isinstance(task, Classify) and task.augment is not None):
        raise UserError("a DataLoader is compared on TFDS images that task.augment changes")
    change, size = task.augment, experiment.batch_size or 128
    augment = jax.jit(lambda images, key: change(pixels(images), key))

    def ours(cache_gb: float, workers: int) -> Iterator[Any]:
        split = dataclasses.replace(data, cache_gb=cache_gb).load()["train"]
        made = splits.training(split, size, 0, 0, 1 << 30, workers)
        for n, batch in enumerate(made):
            key = jax.random.fold_in(jax.random.key(0), n)
            yield jax.block_until_ready((augment(batch["inputs"], key), batch["targets"]))

    from research.bench.torch_data import endless

    feeds = {
        "kept": ours(data.cache_gb, 0),
        "read": ours(1e-9, workers),
        "torch": endless(data, size, workers, change.crop, change.flip),
    }
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    for feed in feeds.values():  # workers start, programs compile
        next(feed)
    for _ in range(rounds):
        for name, feed in feeds.items():
            time.sleep(rest)
            for _ in range(AHEAD):
                next(feed)
            start = time.perf_counter()
            for _ in range(batches):
                next(feed)
            seconds[name].append((time.perf_counter() - start) / batches)
    return Loaders(**{name: size / statistics.median(each) for name, each in seconds.items()})
