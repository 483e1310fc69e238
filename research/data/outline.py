"""Data in outline: what a step is traced and compiled with where the data is not."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge

from research.data.splits import Splits
from research.experiment import Experiment, Source


@runtime_checkable
class HasOutline(Protocol):
    """A source that can say, unread, what its batches are like."""

    def outline(self, rows: int) -> Splits | None:
        """The splits that `load` gives, with as many rows, all zeros, as a batch of `rows` needs;
        nothing is read, and an array takes no memory. None: only the data tells."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """Another source in outline, or as it is where only its data tells what batches are like."""

    data: Source
    rows: Annotated[int, Ge(1)]
    """Of a batch."""

    def load(self) -> Mapping[str, Any]:
        found = self.data.outline(self.rows) if isinstance(self.data, HasOutline) else None
        return self.data.load() if found is None else found


def outlined(e: Experiment) -> Experiment:
    """The experiment on its data in outline: `prepare` then gives the step that it has on the data
    itself, and no data need be there. It is not for training. A batch of the whole training split
    is as large as the data says.
    """
    if e.batch_size is None:
        return e
    return dataclasses.replace(e, data=Outline(data=e.data, rows=e.batch_size))
