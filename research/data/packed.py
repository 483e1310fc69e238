"""Packed sequences: whole documents side by side in a row, for models that keep them apart."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from research import UserError
from research.data.splits import ALL, Batch, Lazy, blank, padded, shuffled


@dataclasses.dataclass(frozen=True)
class Packed:
    """Documents of a token stream, packed into rows of `length` predictions.

    A document is n - 1 inputs, each with the token after it as its target; its last token is no
    input. Only a document of more predictions than a row has is cut, into pieces that are
    documents of their own but for their first token, which is the last target of the piece before:
    every token but the first of its document is predicted exactly once an epoch. Training shuffles
    the rows anew each epoch; evaluation goes through them once.

    Batches have, beside inputs, targets and weights, for each place in a row its document
    (segments, from 1; 0 is padding) and its distance from the start of that (positions).

    starts, sizes: each piece's first token and its number of predictions, row by row; rows: where
    in these each row begins, and the end. `index` makes them, to be kept and mapped. bad: tokens
    (bool) that are not to be predicted.
    """

    threads: ClassVar[int] = 0
    tokens: np.ndarray
    length: int
    starts: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray
    bad: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.sizes.sum())

    @property
    def efficiency(self) -> float:
        """The share of places that are not padding."""
        return len(self) / max((len(self.rows) - 1) * self.length, 1)

    def batch(self, step: int, batch_size: int, seed: int, part: slice = ALL) -> Batch:
        rows = shuffled(step, batch_size, seed, len(self.rows) - 1)
        return self._take(rows[part])

    def evaluation(self, batch_size: int, part: slice = ALL) -> Sequence[Batch]:
        rows = np.arange(len(self.rows) - 1)

        def make(i: int) -> Batch:
            index, padding = padded(rows, i, batch_size)
            return blank(self._take(index[part]), padding[part])

        return Lazy(make, -(-len(rows) // batch_size))

    def check(self, batch_size: int) -> None:
        rows = len(self.rows) - 1
        if not rows:
            raise UserError("the training text has no document of two tokens or more")
        if batch_size > rows:
            raise UserError(
                f"batch_size {batch_size} exceeds the {rows} rows of {self.length} tokens that "
                "the training documents are packed into"
            )

    def arrays(self) -> Mapping[str, np.ndarray]:
        names = ("tokens", "starts", "sizes", "rows", "bad")
        return {name: array for name in names if (array := getattr(self, name)) is not None}

    def _take(self, rows: np.ndarray) -> Batch:
        first, end = self.rows[rows], self.rows[rows + 1]
        pieces = _ranges(first, end - first)
        sizes = self.sizes[pieces]
        segments = np.repeat(_ranges(np.ones(len(rows), int), end - first), sizes)
        positions = _ranges(np.zeros(len(pieces), int), sizes)
        inputs = _ranges(self.starts[pieces], sizes)  # places in the text, as those below
        row = np.repeat(np.repeat(np.arange(len(rows)), end - first), sizes)
        column = _ranges(np.zeros(len(rows), int), np.bincount(row, minlength=len(rows)))

        def placed(values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
            array: np.ndarray = np.zeros((len(rows), self.length), dtype)
            array[row, column] = values
            return array

        batch = {
            "inputs": placed(self.tokens[inputs]),
            "targets": placed(self.tokens[inputs + 1]),
            "segments": placed(segments),
            "positions": placed(positions),
        }
        weights = (batch["segments"] > 0).astype(np.float32)
        if self.bad is not None:
            batch["bad"] = placed(self.bad[inputs + 1], bool)
            weights[batch["bad"]] = 0
        return batch | {"weights": weights}


def pack(
    tokens: np.ndarray, offsets: np.ndarray, length: int, bad: np.ndarray | None = None
) -> Packed:
    """Packs documents, of which the nth is tokens[offsets[n]:offsets[n + 1]]."""
    return Packed(tokens, length, **index(offsets, length), bad=bad)


def index(offsets: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """`Packed`'s starts, sizes and rows, for documents that begin and end at offsets."""
    offsets = np.asarray(offsets, np.int64)
    predictions = np.maximum(np.diff(offsets) - 1, 0)
    pieces = -(-predictions // length)
    done = _ranges(np.zeros_like(pieces), pieces) * length  # predictions of the pieces before
    starts = np.repeat(offsets[:-1], pieces) + done
    sizes = np.minimum(np.repeat(predictions, pieces) - done, length)
    row = best_fit(sizes, length)
    order = np.argsort(row, kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(row))])
    return {
        "starts": starts[order],
        "sizes": sizes[order].astype(np.int32),
        "rows": rows.astype(np.int64),
    }


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each size, of 1 to `length`, so that no row's sum exceeds `length`.

    The largest first, each into the row that it leaves the least room in (best-fit decreasing;
    Ding et al. 2024). Rows are kept by their room, and a bit for each room says whether there is a
    row that has it, so that no row is searched for.
    """
    by_room: list[list[int]] = [[] for _ in range(length)]
    there, count = 0, 0
    found = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    placed = []
    for size in sizes[order].tolist():
        if fits := there >> size:
            room = size + (fits & -fits).bit_length() - 1  # the lowest bit from `size` on
            row = by_room[room].pop()
            if not by_room[room]:
                there ^= 1 << room
        else:
            room, row = length, count
            count += 1
        placed.append(row)
        if room > size:
            by_room[room - size].append(row)
            there |= 1 << (room - size)
    found[order] = placed
    return found


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whole numbers from each start on, `sizes` of them each, one after the other."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)
