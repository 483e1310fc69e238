"""What turns a table's raw cells into numbers: fitted to training rows, kept with the run.

Shapes: B rows, F features.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from research import UserError
from research.data import cells
from research.data.cells import Refuse

MISSING, OTHER = "<missing>", "<other>"
BOOLEANS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
Kind = Literal["number", "boolean", "category"]


def number(cell: str) -> float | None:
    """None where a cell is no number; NaN and infinities are."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def kind_of(found: Sequence[str]) -> Kind:
    """What a column is, from its cells that are not missing."""
    if all(cell.lower() in BOOLEANS for cell in found):
        return "boolean"
    if _all_numbers(found) is not None:
        return "number"
    return "category" if any(number(cell) is None for cell in found) else "number"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """A column of numbers, or of truth values as 1 and 0, standardised."""

    name: str
    boolean: bool
    fill: float | None
    """What stands for a missing cell; None: such a row cannot be taken."""
    mean: float
    std: float
    indicator: bool
    """Whether a second input is 1 where the cell is missing."""

    @property
    def inputs(self) -> list[str]:
        return [self.name, f"{self.name} {MISSING}"] if self.indicator else [self.name]

    @classmethod
    def fit(
        cls, name: str, found: np.ndarray, *, boolean: bool, fill: str | None, indicator: bool
    ) -> "Number":
        """found: the training rows' numbers, NaN where one is missing.

        fill: median or mean; None where missing cells were not to be filled.
        """
        there = found[~np.isnan(found)]
        value = None
        if fill is not None:
            value = float(np.median(there) if fill == "median" else np.mean(there))
            found = np.where(np.isnan(found), value, found)
        with np.errstate(over="ignore"):
            mean, std = float(np.mean(found)), float(np.std(found))
        if found.min() == found.max():  # whose deviation may not come out as 0
            mean, std = float(found[0]), 1.0
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise UserError(f"column {name}: its numbers are too large, or too close, to be scaled")
        return cls(name=name, boolean=boolean, fill=value, mean=mean, std=std, indicator=indicator)

    def encode(self, found: Sequence[str], refuse: Refuse) -> np.ndarray:
        """Cells [B] -> inputs [B, 1], or [B, 2] with an indicator."""
        values = parsed(self.name, found, self.boolean, refuse)
        missing = np.array([not cell for cell in found], bool)
        if self.fill is None:
            for i in np.flatnonzero(missing).tolist():
                refuse(i, f"{self.name} is missing, and rows with missing cells were dropped")
        filled = np.where(np.isnan(values), self.mean if self.fill is None else self.fill, values)
        with np.errstate(over="ignore"):
            scaled = ((filled - self.mean) / self.std).astype(np.float32)
        for i in np.flatnonzero(~np.isfinite(scaled)).tolist():
            refuse(i, f"{self.name} is {found[i]}, too large beside the training rows'")
        return np.stack([scaled, missing.astype(np.float32)][: len(self.inputs)], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    """A column of words, each of which is one input that is 1 where it stands."""

    name: str
    words: tuple[str, ...]
    missing: bool
    """Whether a missing cell is a category of its own; a row with one cannot be taken otherwise."""

    @property
    def inputs(self) -> list[str]:
        of_its_own = [MISSING, OTHER] if self.missing else [OTHER]
        return [f"{self.name} {word}" for word in (*self.words, *of_its_own)]

    @classmethod
    def fit(
        cls, name: str, found: Sequence[str], *, min_count: int, most: int, missing: bool
    ) -> "Category":
        counts = Counter(cell for cell in found if cell)
        if len(counts) > most:
            raise UserError(
                f"column {name} has {len(counts)} different values in the training rows, more than "
                f"max_categories = {most}: add it to ignore, or raise max_categories"
                f"{_odd_ones(name, counts)}"
            )
        words = sorted((word for word, n in counts.items() if n >= min_count), key=_order)
        return cls(name=name, words=tuple(words), missing=missing)

    def encode(self, found: Sequence[str], refuse: Refuse) -> np.ndarray:
        """Cells [B] -> inputs [B, categories]."""
        place = {word: i for i, word in enumerate(self.words)}
        width = len(self.inputs)
        if self.missing:
            place[""] = width - 2
        for i, cell in enumerate(found):
            if not cell and not self.missing:
                refuse(i, f"{self.name} is missing, and rows with missing cells were dropped")
        one_hot = np.zeros((len(found), width), np.float32)
        one_hot[np.arange(len(found)), [place.get(cell, width - 1) for cell in found]] = 1
        return one_hot


def parsed(name: str, found: Sequence[str], boolean: bool, refuse: Refuse) -> np.ndarray:
    """Cells [B] as float64, NaN where one is missing; refuses what is no finite number."""
    if not boolean and (quick := _all_numbers(found)) is not None:
        return quick
    values = np.full(len(found), np.nan)
    for i, cell in enumerate(found):
        if not cell:
            continue
        value = BOOLEANS.get(cell.lower()) if boolean else number(cell)
        if value is None:
            expected = "true or false" if boolean else "a number"
            refuse(i, f"{name} is {cell!r}, and not {expected}")
        elif not math.isfinite(value):
            either = f"empty, or among missing_values as {cell}"
            refuse(i, f"{name} is {cell}: a number must be finite, and a missing cell {either}")
        else:
            values[i] = value
    return values


def _all_numbers(found: Sequence[str]) -> np.ndarray | None:
    """The same in one go where every cell that is not empty is a finite number, and else None."""
    try:
        values = np.array([float(cell) if cell else np.nan for cell in found])
    except ValueError:
        return None
    there = np.array([bool(cell) for cell in found], bool)
    return values if np.isfinite(values[there]).all() and "_" not in "".join(found) else None


def _odd_ones(name: str, counts: Mapping[str, int]) -> str:
    """A hint where a column of many values would be numbers but for a few."""
    odd = [word for word in counts if number(word) is None]
    if len(odd) > len(counts) / 10:
        return ""
    return f"; or add it to numbers, where {odd[0]!r} is a bad row" if odd else ""


def _order(word: str) -> tuple[bool, float, str]:
    """Numbers by size, before words."""
    value = number(word)
    return (value is None, value if value is not None else 0.0, word)


def label(cell: str) -> str:
    """A class's name: a whole number as such, whether it is written 1 or 1.0."""
    return cell if "." not in cell else re.sub(r"^([+-]?\d+)\.0*$", r"\1", cell)


def classes_of(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(set(labels), key=_order))


def none_of(classes: Sequence[str]) -> str:
    few = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
    return f"which is none of the classes {few}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """Raw cells to inputs, and labels to targets, as training had them."""

    target: str
    classes: tuple[str, ...] | None
    """The classes' names, in the order of their numbers; None: the target is a number."""
    columns: tuple[Number | Category, ...]
    missing_values: tuple[str, ...]
    """Cells that are missing besides empty ones."""

    @property
    def inputs(self) -> list[str]:
        """What each feature of the inputs is."""
        return [name for column in self.columns for name in column.inputs]

    def apply(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Raw rows, or raw columns by name, to inputs [B, F] float32.

        Cells are text, numbers, truth values or None. Other columns than those of the transform
        are left aside. Raises UserError, naming the row (from 0), for a cell that does not fit.
        """

        def refuse(i: int, reason: str) -> NoReturn:
            raise UserError(f"row {i}: {reason}")

        found = cells.columns(rows, [column.name for column in self.columns])
        return self.encode({name: self.blank(column) for name, column in found.items()}, refuse)

    def blank(self, found: Sequence[str]) -> list[str]:
        """Cells, those that count as missing empty."""
        return ["" if cell in self.missing_values else cell for cell in found]

    def encode(self, columns: Mapping[str, Sequence[str]], refuse: Refuse) -> np.ndarray:
        """Columns of text, missing cells empty, to inputs [B, F]."""
        parts = [column.encode(columns[column.name], refuse) for column in self.columns]
        return np.concatenate(parts, axis=1)

    def targets(self, found: Sequence[str], refuse: Refuse) -> np.ndarray:
        """Labels [B] to int32 places among the classes [B], or to float32 [B, 1]."""
        if self.classes is None:
            with np.errstate(over="ignore"):
                values = parsed(self.target, found, False, refuse).astype(np.float32)
            for i in np.flatnonzero(~np.isfinite(values)).tolist():
                reason = f"{found[i]}, too large for float32" if found[i] else "missing"
                refuse(i, f"{self.target}, the target, is {reason}")
            return values[:, None]
        place = {name: i for i, name in enumerate(self.classes)}
        for i, cell in enumerate(found):
            if label(cell) not in place:
                refuse(i, f"{self.target} is {cell!r}, {none_of(self.classes)}")
        return np.array([place.get(label(cell), 0) for cell in found], np.int32)

    def dumps(self) -> str:
        columns = [
            {"kind": type(column).__name__} | dataclasses.asdict(column) for column in self.columns
        ]
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps(found | {"columns": columns}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def loads(cls, text: str) -> "Transform":
        """The inverse of `dumps`. Raises UserError for another text."""
        kinds: dict[str, type[Number] | type[Category]] = {"Number": Number, "Category": Category}
        try:
            found = json.loads(text)
            columns = []
            for column in found.pop("columns"):
                of = kinds[column.pop("kind")]
                columns.append(of(**{k: _tuple(v) for k, v in column.items()}))
            return cls(columns=tuple(columns), **{k: _tuple(v) for k, v in found.items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"this is no table.json: {error}") from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
