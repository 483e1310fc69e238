"""Training examples dealt out to clients, each of which has a share of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from research import UserError
from research.data.splits import ALL, Batch, Examples, Splits, shuffled
from research.experiment import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Another source, whose training batches have in their i-th of `clients` equal parts examples
    of the i-th share alone. Other splits are as they are.

    Raises UserError where the source has no examples in memory, as a text has not, or no classes
    to deal unevenly.
    """

    data: Source
    clients: Annotated[int, Ge(1)]
    alpha: Annotated[float, Gt(0)] | None = None
    """How alike the shares' classes are: each class is dealt in proportions drawn from a symmetric
    Dirichlet distribution (Hsu et al. 2019), of which 0.1 gives most clients a class or two. None:
    every share is a random one of equal size."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the dealing, which stays the same whatever the run's seed."""

    def load(self) -> Splits:
        found = self.data.load()
        train = found["train"]
        if not isinstance(train, Examples):
            raise UserError("data: shares are of examples in memory, which this source has not")
        targets = train.rows.get("targets")
        if self.alpha is None:
            targets = np.zeros(len(train), int)
        elif targets is None or targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
            raise UserError("data.alpha: only classes are dealt unevenly, one an example")
        dealt = Dealt(train.rows, deal(targets, self.clients, self.alpha, self.seed))
        files, notes = getattr(found, "files", {}), getattr(found, "notes", ())
        return Splits({**found, "train": dealt}, files, notes)


def deal(
    classes: np.ndarray, clients: int, alpha: float | None, seed: int
) -> tuple[np.ndarray, ...]:
    """The rows of each client, of rows [n] of integer classes; no client is left without any.

    Raises UserError where there are fewer rows than clients.
    """
    if len(classes) < clients:
        raise UserError(f"data.clients {clients} exceeds the {len(classes)} training examples")
    rng = np.random.default_rng(seed)
    dealt: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for each in np.unique(classes):
        rows = rng.permutation(np.flatnonzero(classes == each))
        portions = (
            np.full(clients, 1 / clients) if alpha is None else rng.dirichlet([alpha] * clients)
        )
        ends = np.round(np.cumsum(portions)[:-1] * len(rows)).astype(int)
        for share, part in zip(dealt, np.split(rows, ends), strict=True):
            share.append(part)
    shares = [np.concatenate(parts) for parts in dealt]
    for i in range(clients):
        if not len(shares[i]):  # one from the largest
            largest = max(range(clients), key=lambda k: len(shares[k]))
            shares[largest], shares[i] = shares[largest][:-1], shares[largest][-1:]
    return tuple(shares)


@dataclasses.dataclass(frozen=True)
class Dealt(Examples):
    """Examples of which each share is shuffled by itself."""

    shares: Sequence[np.ndarray]

    def batch(self, step: int, batch_size: int, seed: int, part: slice = ALL) -> Batch:
        each = batch_size // len(self.shares)
        rows = [share[shuffled(step, each, seed, len(share))] for share in self.shares]
        return self.take(np.concatenate(rows)[part])

    def check(self, batch_size: int) -> None:
        if batch_size % len(self.shares):
            raise UserError(
                f"batch_size {batch_size} does not divide over the {len(self.shares)} clients "
                "that data has shares for"
            )
