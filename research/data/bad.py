"""Bad rows: refused by default, or kept in their places with weight 0 and counted."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge

from research import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """What a source that reads rows from files has in common with others."""

    on_bad: Literal["raise", "skip"] = "raise"
    """A row that cannot be read: raise names its file and place and ends the run, before it
    starts where rows are read once; skip keeps its place with weight 0, in the loss and in every
    metric."""
    max_bad: Annotated[int, Ge(0)] = 100
    """Bad rows that are skipped; one more ends the run."""

    def bad(self) -> "Bad":
        return Bad(self.on_bad, self.max_bad)


@dataclasses.dataclass
class Bad:
    """The bad rows that were found so far."""

    on_bad: Literal["raise", "skip"]
    max_bad: int
    found: dict[str, str] = dataclasses.field(default_factory=dict)
    """What is wrong, by the row's file and place: a row that is read again counts once."""

    def __call__(self, where: str, reason: str) -> None:
        """Counts a bad row, once. Raises UserError where rows must not be bad, or too many are.

        where: its file and place, as in train.csv, line 7.
        """
        if self.on_bad == "raise":
            raise UserError(f"{where}: {reason}")
        self.found[where] = reason
        if len(self.found) > self.max_bad:
            raise UserError(f"more than max_bad = {self.max_bad} bad rows; {where}: {reason}")

    def notes(self) -> list[str]:
        """What a run says of them: their number, and the first."""
        if not self.found:
            return []
        n, (where, reason) = len(self.found), next(iter(self.found.items()))
        return [f"{n} bad row{'s' * (n > 1)} skipped, first {where}: {reason}"]
