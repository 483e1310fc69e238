"""Splits: what turns (seed, step) into a batch. No iterator state: step n needs only n."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Protocol

import grain
import numpy as np

from research import UserError

Batch = dict[str, np.ndarray]


class Split(Protocol):
    """One part of a data set."""

    threads: ClassVar[int]
    """Threads that make batches ahead; 0 where arrays are in memory."""

    def __len__(self) -> int:
        """Examples: rows, or predicted tokens."""
        ...

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The training batch of a step: a pure function of its arguments."""
        ...

    def evaluation(self, batch_size: int) -> Sequence[Batch]:
        """Every example once, in order; the last batch is padded with weight 0."""
        ...

    def check(self, batch_size: int) -> None:
        """Raises UserError where the split is too small for a batch."""
        ...

    def arrays(self) -> Mapping[str, np.ndarray]:
        """What the split holds, for its fingerprint."""
        ...


@dataclasses.dataclass(frozen=True)
class Lazy(Sequence[Batch]):
    """A sequence of batches, each made when it is asked for."""

    make: Callable[[int], Batch]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.make(index)


def prefetched(batches: Sequence[Batch], threads: int, ahead: int = 4) -> Iterator[Batch]:
    """Iterates over batches that Grain makes ahead of time in threads.

    With 0 threads each is made when it is asked for: to index an array in memory takes less than
    to hand it from thread to thread.
    """
    if not threads:
        return iter(batches)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def training(split: Split, batch_size: int, seed: int, start: int, stop: int) -> Iterator[Batch]:
    """The batches of steps start to stop - 1; nothing before `start` is read."""
    batches = Lazy(lambda i: split.batch(start + i, batch_size, seed), stop - start)
    return prefetched(batches, split.threads)


def fingerprint(splits: Mapping[str, Split]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all arrays of all splits."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        for key, array in sorted(split.arrays().items()):
            digest.update(f"{name}/{key}:{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _padded(batch: Batch, size: int) -> Batch:
    """Repeats the first row up to `size`; the caller gives those rows weight 0."""
    short = size - len(batch["weights"])
    rows = {k: np.concatenate([v, np.repeat(v[:1], short, axis=0)]) for k, v in batch.items()}
    rows["weights"][size - short :] = 0
    return rows


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Independent rows, shuffled anew each epoch. A batch may span two epochs.

    `rows` maps a batch's keys to arrays whose first axis is the example.
    """

    threads: ClassVar[int] = 0
    rows: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        n = len(self)
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // n
        index = np.concatenate(
            [_permutation(seed, int(e), n)[positions[epochs == e] % n] for e in np.unique(epochs)]
        )
        return self._take(index)

    def evaluation(self, batch_size: int) -> Sequence[Batch]:
        def make(i: int) -> Batch:
            index = np.arange(i * batch_size, min((i + 1) * batch_size, len(self)))
            return _padded(self._take(index), batch_size)

        return Lazy(make, -(-len(self) // batch_size))

    def check(self, batch_size: int) -> None:
        if batch_size > len(self):
            raise UserError(f"batch_size {batch_size} exceeds the {len(self)} training examples")

    def arrays(self) -> Mapping[str, np.ndarray]:
        return self.rows

    def _take(self, index: np.ndarray) -> Batch:
        weights = np.ones(len(index), np.float32)
        return {k: v[index] for k, v in self.rows.items()} | {"weights": weights}


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a token stream, for models that see a window by itself.

    Training draws the starts of windows uniformly with replacement; evaluation goes through the
    stream once in windows that follow one another, so that every token but the first is predicted
    exactly once.
    """

    threads: ClassVar[int] = 0
    tokens: np.ndarray
    length: int

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(self) - self.length + 1, size=batch_size)
        return self._take(starts)

    def evaluation(self, batch_size: int) -> Sequence[Batch]:
        starts = np.arange(0, len(self), self.length)

        def make(i: int) -> Batch:
            rows = starts[i * batch_size : (i + 1) * batch_size]
            return _padded(self._take(rows), batch_size)

        return Lazy(make, -(-len(starts) // batch_size))

    def check(self, batch_size: int) -> None:
        if len(self) < self.length:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens: a window of {self.length} "
                f"needs {self.length + 1}"
            )

    def arrays(self) -> Mapping[str, np.ndarray]:
        return {"tokens": self.tokens}

    def _take(self, starts: np.ndarray) -> Batch:
        index = starts[:, None] + np.arange(self.length + 1)
        inside = index < len(self.tokens)
        tokens = np.where(inside, self.tokens[np.minimum(index, len(self))], 0).astype(np.int32)
        return {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": inside[:, 1:].astype(np.float32),
        }


@dataclasses.dataclass(frozen=True)
class Streams:
    """A token stream cut into one contiguous row an example, for models that carry their state.

    Batch n continues batch n - 1 row by row (truncated back-propagation through time); `reset` is
    True where the rows start again from their beginnings. A few tokens at the end, fewer than a
    batch, are not trained on; evaluation counts every token but the first exactly once.
    """

    threads: ClassVar[int] = 0
    tokens: np.ndarray
    length: int

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        row = len(self) // batch_size
        per_epoch = row // self.length
        return self._take(step % per_epoch, row, batch_size)

    def evaluation(self, batch_size: int) -> Sequence[Batch]:
        row = -(-len(self) // batch_size)
        return Lazy(lambda i: self._take(i, row, batch_size), -(-row // self.length))

    def check(self, batch_size: int) -> None:
        if len(self) // batch_size < self.length:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens: {batch_size} streams of "
                f"at least {self.length} need {batch_size * self.length + 1}"
            )

    def arrays(self) -> Mapping[str, np.ndarray]:
        return {"tokens": self.tokens}

    def _take(self, i: int, row: int, batch_size: int) -> Batch:
        within = i * self.length + np.arange(self.length + 1)
        index = np.arange(batch_size)[:, None] * row + within
        # A row's last target is the next row's first input, so a row holds `row` predictions.
        inside = (within[1:] <= row) & (index[:, 1:] < len(self.tokens))
        tokens = self.tokens[np.minimum(index, len(self))].astype(np.int32)
        return {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": inside.astype(np.float32),
            "reset": np.full(batch_size, i == 0),
        }
