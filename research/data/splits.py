"""Splits: what turns (seed, step) into a batch. No iterator state: step n needs only n."""

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import grain
import numpy as np
from absl import flags

from research import UserError

Batch = dict[str, np.ndarray]
ALL = slice(None)


class Split(Protocol):
    """One part of a data set.

    `part` is the rows of a batch that are asked for, as a process asks for its share: the shares
    of all processes, one after the other, are the whole batch.
    """

    @property
    def threads(self) -> int:
        """Threads that make batches ahead; 0 where arrays are in memory."""
        ...

    def __len__(self) -> int:
        """Examples: rows, or predicted tokens."""
        ...

    def batch(self, step: int, batch_size: int, seed: int, part: slice = ALL) -> Batch:
        """The training batch of a step: a pure function of its arguments."""
        ...

    def evaluation(self, batch_size: int, part: slice = ALL) -> Sequence[Batch]:
        """Every example once, in order; the last batch is padded with weight 0."""
        ...

    def check(self, batch_size: int) -> None:
        """Raises UserError where the split is too small for a batch."""
        ...

    def arrays(self) -> Mapping[str, np.ndarray]:
        """What the split holds, for its fingerprint."""
        ...


class Splits(dict[str, Split]):
    """What a source loads, where a plain dict of splits is not all.

    files: texts that a run keeps beside its config, by name: what raw rows were turned into
    numbers with. notes: lines for its log.
    """

    def __init__(
        self, splits: Mapping[str, Split], files: Mapping[str, str], notes: Sequence[str] = ()
    ) -> None:
        super().__init__(splits)
        self.files, self.notes = dict(files), list(notes)


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


def ahead(threads: int) -> int:
    """Batches that are made before they are asked for."""
    return max(threads, 4)


def prefetched(batches: Sequence[Batch], threads: int, workers: int = 0) -> Iterator[Batch]:
    """Iterates over batches that Grain makes ahead of time, in threads and in worker processes.

    One is made in each thread, and 4 at least are ahead. With neither threads nor workers, each is
    made when it is asked for: to index an array in memory takes less than to hand it from thread
    to thread. The batches, and their order, are the same.
    """
    if not (threads or workers):
        return iter(batches)
    options = grain.ReadOptions(num_threads=max(threads, 1), prefetch_buffer_size=ahead(threads))
    found = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain asks its own, which no command of ours parses
        found = found.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _worker)
    return iter(found)


def _worker(worker: int, workers: int) -> None:
    """Ctrl-C reaches every process, as a cluster's SIGTERM may, and the run needs batches until it
    has saved. Grain ends its workers by other means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is killed cleans nothing up, and its workers wait to give what nobody takes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def training(
    split: Split,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    workers: int = 0,
    part: slice = ALL,
) -> Iterator[Batch]:
    """The batches of steps start to stop - 1, or a part of each; nothing before `start` is read."""
    batches = Lazy(lambda i: split.batch(start + i, batch_size, seed, part), stop - start)
    found = prefetched(batches, split.threads, workers)
    if not (workers and split.threads and isinstance(split, Shuffled)):
        return found

    def counted() -> Iterator[Batch]:
        """Each worker knows its own bad rows alone: read again here, they are counted together."""
        for step, batch in enumerate(found, start):
            if "bad" in batch and batch["bad"].any():
                rows = shuffled(step, batch_size, seed, len(split))[part]
                split.take(rows[batch["bad"]])
            yield batch

    return counted()


def together(split: Split, batch: Batch, workers: int) -> int:
    """Batches like this one to make at once: 256 at most, of 1 MiB, of arrays in memory."""
    if split.threads or workers:
        return 1
    return int(np.clip(2**20 // sum(array.nbytes for array in batch.values()), 1, 256))


def stacked(
    split: Split, first: int, count: int, batch_size: int, seed: int, part: slice = ALL
) -> Batch:
    """The batches of `count` steps from `first` on, or a part of each, on a new first axis."""
    kind: Any = type(split)
    if isinstance(split, Examples) and (kind.batch, kind.take) == (Shuffled.batch, Examples.take):
        # Their rows follow one another, so that each array is indexed once.
        rows = shuffled(first, batch_size, seed, len(split), count)
        found = split.take(rows.reshape(count, batch_size)[:, part].ravel())
        return {k: v.reshape(count, -1, *v.shape[1:]) for k, v in found.items()}
    batches = [split.batch(first + i, batch_size, seed, part) for i in range(count)]
    return {k: np.stack([batch[k] for batch in batches]) for k in batches[0]}


def fingerprint(splits: Mapping[str, Split]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all arrays of all splits."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        for key, array in sorted(split.arrays().items()):
            digest.update(f"{name}/{key}:{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def zeros(dtype: Any, *shape: int) -> np.ndarray:
    """An array of zeros of which one is in memory, to be read alone."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def padded(index: np.ndarray, i: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Batch i of an index, the first of it repeated where it ends; and what is padding."""
    places = np.arange(i * batch_size, (i + 1) * batch_size)
    padding = places >= len(index)
    return index[np.where(padding, 0, places)], padding


def blank(batch: Batch, padding: np.ndarray) -> Batch:
    """Gives padding weight 0, and calls it no bad row."""
    batch["weights"][padding] = 0
    if "bad" in batch:
        batch["bad"][padding] = False
    return batch


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


class Shuffled:
    """Independent rows, shuffled anew each epoch. A batch may span two epochs; one that is all of
    them has them in order."""

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, index: np.ndarray) -> Batch:
        """The rows of an index, with their weights."""
        raise NotImplementedError

    def batch(self, step: int, batch_size: int, seed: int, part: slice = ALL) -> Batch:
        return self.take(shuffled(step, batch_size, seed, len(self))[part])

    def evaluation(self, batch_size: int, part: slice = ALL) -> Sequence[Batch]:
        def make(i: int) -> Batch:
            index, padding = padded(np.arange(len(self)), i, batch_size)
            return blank(self.take(index[part]), padding[part])

        return Lazy(make, -(-len(self) // batch_size))

    def check(self, batch_size: int) -> None:
        if batch_size > len(self):
            raise UserError(f"batch_size {batch_size} exceeds the {len(self)} training examples")


@dataclasses.dataclass(frozen=True)
class Examples(Shuffled):
    """Rows of arrays.

    `rows` maps a batch's keys to arrays whose first axis is the example. Among them may be bad
    (bool): those rows keep their places with weight 0.
    """

    threads: ClassVar[int] = 0
    rows: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def arrays(self) -> Mapping[str, np.ndarray]:
        return self.rows

    def take(self, index: np.ndarray) -> Batch:
        batch = {k: _rows(v, index) for k, v in self.rows.items()}
        weights = np.ones(len(index), np.float32)
        if "bad" in batch:
            weights[batch["bad"]] = 0
        return batch | {"weights": weights}


def _rows(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    if not array.flags.c_contiguous:  # of which `take` would copy all
        return array[index]
    # In a third of array[index]'s time; of a memory map it would be one itself.
    return np.asarray(array.take(index, 0))


def shuffled(step: int, batch_size: int, seed: int, n: int, steps: int = 1) -> np.ndarray:
    """The rows of the batches of `steps` steps, of n that are shuffled anew each epoch."""
    if batch_size == n:  # a mean over all of them has no order, and to draw one takes time
        return np.tile(np.arange(n), steps)
    start, stop = step * batch_size, (step + steps) * batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    pieces = [
        _permutation(seed, e, n)[max(start - e * n, 0) : min(stop - e * n, n)] for e in epochs
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of a token stream, for models that see a window by itself.

    Training draws the starts of windows uniformly with replacement; evaluation goes through the
    stream once in windows that follow one another, so that every token but the first is predicted
    exactly once. bad: tokens (bool) that are not to be predicted.
    """

    threads: ClassVar[int] = 0
    tokens: np.ndarray
    length: int
    bad: np.ndarray | None = None

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0)

    def batch(self, step: int, batch_size: int, seed: int, part: slice = ALL) -> Batch:
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(len(self) - self.length + 1, size=batch_size)
        return self._take(starts[part])

    def evaluation(self, batch_size: int, part: slice = ALL) -> Sequence[Batch]:
        starts = np.arange(0, len(self), self.length)

        def make(i: int) -> Batch:
            rows, padding = padded(starts, i, batch_size)
            return blank(self._take(rows[part]), padding[part])

        return Lazy(make, -(-len(starts) // batch_size))

    def check(self, batch_size: int) -> None:
        if len(self) < self.length:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens: a window of {self.length} "
                f"needs {self.length + 1}"
            )

    def arrays(self) -> Mapping[str, np.ndarray]:
        return _tokens(self.tokens, self.bad)

    def _take(self, starts: np.ndarray) -> Batch:
        index = starts[:, None] + np.arange(self.length + 1)
        return predicted(self.tokens, index, index[:, 1:] < len(self.tokens), self.bad)


@dataclasses.dataclass(frozen=True)
class Streams:
    """A token stream cut into one contiguous row an example, for models that carry their state.

    Batch n continues batch n - 1 row by row (truncated back-propagation through time); `reset` is
    True where the rows start again from their beginnings. A few tokens at the end, fewer than a
    batch, are not trained on; evaluation counts every token but the first exactly once. bad: tokens
    (bool) that are not to be predicted.
    """

    threads: ClassVar[int] = 0
    tokens: np.ndarray
    length: int
    bad: np.ndarray | None = None

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0)

    def batch(self, step: int, batch_size: int, seed: int, part: slice = ALL) -> Batch:
        row = len(self) // batch_size
        per_epoch = row // self.length
        return self._take(step % per_epoch, row, np.arange(batch_size)[part])

    def evaluation(self, batch_size: int, part: slice = ALL) -> Sequence[Batch]:
        row = -(-len(self) // batch_size)
        rows = np.arange(batch_size)[part]
        return Lazy(lambda i: self._take(i, row, rows), -(-row // self.length))

    def check(self, batch_size: int) -> None:
        if len(self) // batch_size < self.length:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens: {batch_size} streams of "
                f"at least {self.length} need {batch_size * self.length + 1}"
            )

    def arrays(self) -> Mapping[str, np.ndarray]:
        return _tokens(self.tokens, self.bad)

    def _take(self, i: int, row: int, rows: np.ndarray) -> Batch:
        within = i * self.length + np.arange(self.length + 1)
        index = rows[:, None] * row + within
        # A row's last target is the next row's first input, so a row holds `row` predictions.
        inside = (within[1:] <= row) & (index[:, 1:] < len(self.tokens))
        batch = predicted(self.tokens, index, inside, self.bad)
        return batch | {"reset": np.full(len(rows), i == 0)}


def predicted(
    tokens: np.ndarray, index_BT: np.ndarray, inside_BT: np.ndarray, bad: np.ndarray | None
) -> Batch:
    """Rows of tokens, each but the first of a row predicted from those before.

    index_BT: places of the tokens [B, T + 1]; inside_BT: which of the T predictions count.
    """
    index_BT = np.minimum(index_BT, len(tokens) - 1)
    rows = tokens[index_BT].astype(np.int32)
    batch = {"inputs": rows[:, :-1], "targets": rows[:, 1:]}
    weights = inside_BT.astype(np.float32)
    if bad is not None:
        batch["bad"] = bad[index_BT[:, 1:]] & inside_BT
        weights[batch["bad"]] = 0
    return batch | {"weights": weights}


def _tokens(tokens: np.ndarray, bad: np.ndarray | None) -> Mapping[str, np.ndarray]:
    return {"tokens": tokens} | ({} if bad is None else {"bad": bad})
