"""Tables: CSV, TSV or Parquet to inputs of numbers and targets. Shapes: B rows, F features."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Interval

from research import UserError
from research.data import cells, files
from research.data.bad import Bad
from research.data.cells import Cells, Named
from research.data.splits import Examples, Splits
from research.data.tfds import FilesOrTFDS, read_table
from research.data.transform import (
    Category,
    Kind,
    Number,
    Transform,
    classes_of,
    kind_of,
    label,
    none_of,
    number,
    parsed,
)

Share = Annotated[float, Interval(ge=0, lt=1)]
FEW = 20
"""Different whole numbers that a target has at most where they are taken for classes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(FilesOrTFDS):
    """A table with a header, or one of TFDS: train, validation and test rows of it, or test rows of
    a second file.

    Of TFDS the columns are features of one value, and classes have their names.

    A column is of numbers, of truth values (true, false, yes, no) or of categories, as the training
    rows have it. Numbers are standardised, and categories one-hot, with what training rows have
    alone; cells are stripped of spaces. The run keeps all of it in table.json, which
    `research.data.transform.Transform` applies to raw rows.

    inputs: [batch, features] float32; targets: [batch] int32, or float32 [batch, 1].
    """

    path: str
    """.csv, .tsv or .parquet, below $ERGON_DATA where it is not found as it stands; or a split."""
    target: str
    """The column that is to be predicted."""
    test: str | None = None
    """Another file, or split, with the same columns, that all test rows are of; None: a share of
    `path`."""
    kind: Literal["classes", "regression"] | None = None
    """None: regression where the target is of numbers, not whole or of more than 20 values."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their numbers, all others being bad; (): those in training."""
    ignore: tuple[str, ...] = ()
    """Columns that are no inputs."""
    categories: tuple[str, ...] = ()
    """Columns of numbers that are categories."""
    numbers: tuple[str, ...] = ()
    """Columns that are of numbers, so that a word among the training rows is a bad row."""
    missing: Literal["impute", "drop"] = "impute"
    """Rows with an empty cell: impute gives a number what `fill` says and makes a category
    <missing>; drop leaves the row out, before the table is split."""
    missing_values: tuple[str, ...] = ()
    """Cells that count as empty, such as NA."""
    fill: Literal["median", "mean"] = "median"
    """What of the training rows' numbers a missing one gets."""
    indicators: tuple[str, ...] = ()
    """Columns of numbers with a second input, which is 1 where the cell was missing."""
    max_categories: Annotated[int, Ge(1)] = 50
    """Values that a column of categories may have among the training rows."""
    min_count: Annotated[int, Ge(1)] = 1
    """Training rows that a category must have; rarer ones are <other>, as unseen ones are."""
    validation: Share = 0.1
    """Share of the rows of `path`; of each class, where there are classes."""
    test_share: Share = 0.2
    """The same, where `test` names no file."""
    split: Annotated[int, Ge(0)] = 0
    """Seed of the division into splits."""
    separator: str | None = None
    """Between the cells of a line; None: a tab in .tsv, and otherwise a comma."""

    def __post_init__(self) -> None:
        if self.validation + (0 if self.test else self.test_share) >= 1:
            raise UserError("validation and test_share leave no rows to train on")
        if self.classes and self.kind == "regression":
            raise UserError("a regression has no classes: leave out classes, or kind")
        if len(set(self.classes)) < len(self.classes):
            raise UserError(f"classes has a name twice: {', '.join(self.classes)}")
        if self.target in self.ignore:
            raise UserError(f"the target {self.target} is in ignore")
        if both := {*self.categories} & {*self.numbers, *self.indicators}:
            raise UserError(f"{min(both)} is in categories, and in numbers or indicators")
        if self.separator is not None and len(self.separator) != 1:
            raise UserError(f"separator must be one character, not {self.separator!r}")
        if self.separator is not None and self.tfds is not None:
            raise UserError(f"separator is between cells of files, and {self.tfds} is TFDS's")
        if self.missing == "drop" and self.indicators:
            raise UserError("indicators says where cells were missing, and drop drops those rows")

    def load(self) -> Splits:
        skip = self.bad()
        notes: list[str] = []
        whole = self._cells(self.path, self._named, skip)
        names = self._inputs(whole)
        other = None
        if self.test is not None:
            other = self._cells(self.test, {}, skip)
            self._same_columns(whole, other, names)
        if self.missing == "drop":
            whole = self._dropped(whole, names, notes)
            other = None if other is None else self._dropped(other, names, notes)
        strata, classed = self._labels(whole)
        parts = {name: (whole, index) for name, index in self._parts(whole, strata).items()}
        if other is not None:
            parts["test"] = (other, np.arange(len(other)))
        for name, (file, index) in parts.items():
            if not len(index):
                raise UserError(f"the {name} split is empty: {file.source} has {len(file)} rows")
        transform = self._fit(whole, parts["train"][1], names, strata, classed)
        splits = {}
        for name, (file, index) in parts.items():
            inputs, targets = self._encoded(transform, file, index)
            rows = {"inputs": inputs, "targets": targets}
            if self.on_bad == "skip":
                rows["bad"] = file.bad[index]
            splits[name] = Examples(rows)
        notes += [*self._described(transform, splits), *self._holes(*parts["train"], names)]
        notes += skip.notes()
        return Splits(splits, {"table.json": transform.dumps()}, notes)

    def _cells(self, at: str, named: Named, skip: Bad) -> Cells:
        if self.tfds is None:
            return cells.read(files.find(at), self.separator, skip, named=named)
        return read_table(
            self.tfds,
            self.data_dir,
            at,
            skip,
            named=named,
            wanted=lambda name: name not in self.ignore,
        )

    @property
    def _named(self) -> Named:
        """Columns by the fields that name them."""
        fields = ("ignore", "categories", "numbers", "indicators")
        return {"target": (self.target,)} | {field: getattr(self, field) for field in fields}

    def _inputs(self, file: Cells) -> list[str]:
        found = [n for n in file.names if n != self.target and n not in self.ignore]
        if not found:
            raise UserError(f"{file.source} has no column left to predict {self.target} from")
        return found

    def _same_columns(self, train: Cells, test: Cells, names: Sequence[str]) -> None:
        for name in (*names, self.target):
            if name not in test.names:
                raise UserError(f"{test.source} has no column {name}, and {train.source} has one")
        for name in test.names:
            if name not in train.names and name not in self.ignore:
                raise UserError(f"{test.source} has a column {name}, and {train.source} has none")

    def _empty(self, cell: str) -> bool:
        return not cell or cell in self.missing_values

    def _dropped(self, file: Cells, names: Sequence[str], notes: list[str]) -> Cells:
        good = np.flatnonzero(~file.bad)
        empty = np.zeros(len(file), bool)
        for name in names:
            cells_of = file.column(name, good)
            empty[good] |= np.array([self._empty(cell) for cell in cells_of], bool)
        n = int(empty.sum())
        if n:
            notes.append(f"{file.source}: {n} of {len(file)} rows dropped, for a cell is missing")
        if n == len(file) > 0:
            raise UserError(
                f"{file.source}: a cell is missing in every row: see ignore, and missing"
            )
        return file.without(empty)

    def _labels(self, file: Cells) -> tuple[np.ndarray, bool]:
        """What rows are split by, "" of bad ones, and whether they are classes' names."""
        found = np.full(len(file), "", object)
        good = np.flatnonzero(~file.bad)
        for i, cell in zip(good.tolist(), file.column(self.target, good), strict=True):
            if self._empty(cell):
                file.refuse(i, f"{self.target}, the target, is missing")
            else:
                found[i] = label(cell)
        classed = self._classed(file, set(found[~file.bad]))
        if not classed:
            return np.where(file.bad, "", "0"), False
        given = self._given(file)
        known = given or classes_of(found[~file.bad])
        most = max(self.max_categories, FEW)
        if not given and len(known) > most:
            raise UserError(
                f"{file.source}: the target {self.target} has {len(known)} classes, more than "
                f"max_categories = {most}"
            )
        for i in np.flatnonzero(~file.bad).tolist():
            if found[i] not in known:
                file.refuse(i, f"{self.target} is {found[i]!r}, {none_of(known)}")
        return np.where(file.bad, "", found), True

    def _given(self, file: Cells) -> tuple[str, ...]:
        """The classes that were given, or that the file declares; () where they are to be found."""
        return tuple(map(label, self.classes or file.classes.get(self.target, ())))

    def _classed(self, file: Cells, labels: set[str]) -> bool:
        """Whether different labels are classes."""
        if self.kind is not None or self._given(file):
            return self.kind != "regression"
        values = [value for name in labels if (value := number(name)) is not None]
        whole = all(cells.int_of(v) is not None for v in values if math.isfinite(v))
        return len(values) < len(labels) or (whole and len(values) <= FEW)

    def _parts(self, file: Cells, strata: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of each split, in the file's order; every stratum has its share of each."""
        rng = np.random.default_rng(self.split)
        place = np.empty(len(file))
        members: dict[str, list[int]] = {}
        for i, name in enumerate(strata):
            members.setdefault(name, []).append(i)
        for name in sorted(members):
            rows = rng.permutation(members[name])
            # Evenly spread over 0 to 1; the last of them is to be trained on, however few they are.
            place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
            place[rows[-1]] = 1
        order = np.argsort(place, kind="stable")
        shares = {} if self.test else {"test": self.test_share}
        shares["validation"] = self.validation
        sizes = {name: round(share * len(file)) for name, share in shares.items() if share}
        cuts = np.cumsum([0, *sizes.values(), len(file) - sum(sizes.values())])
        names = (*sizes, "train")
        found = {n: np.sort(order[a:b]) for n, a, b in zip(names, cuts, cuts[1:], strict=False)}
        return {name: found[name] for name in ("train", "validation", "test") if name in found}

    def _fit(
        self,
        file: Cells,
        index: np.ndarray,
        names: Sequence[str],
        strata: np.ndarray,
        classed: bool,
    ) -> Transform:
        kinds: dict[str, Kind] = {}
        values: dict[str, np.ndarray] = {}
        for name in names:
            kinds[name] = kind = self._kind(file, self._good(file, index), name)
            if kind != "category":  # in every column before any is scaled: bad rows have no part
                values[name] = self._read(file, index, name, kind == "boolean")
        good = self._good(file, index)
        try:
            columns = [
                self._number(name, values[name][~file.bad[index]], kind == "boolean")
                if name in values
                else self._category(name, self._column(file, good, name))
                for name, kind in kinds.items()
            ]
        except UserError as error:
            raise UserError(f"{file.source}: {error}") from None
        classes = None
        if classed:
            classes = self._given(file) or classes_of(strata[good])
            if len(classes) < 2:
                raise UserError(f"{file.source}: {self.target} has one class, {classes[0]}")
        return Transform(
            target=self.target,
            classes=classes,
            columns=tuple(columns),
            missing_values=self.missing_values,
        )

    def _good(self, file: Cells, index: np.ndarray) -> np.ndarray:
        good = index[~file.bad[index]]
        if not len(good):
            raise UserError(f"{file.source}: every training row is bad")
        return good

    def _category(self, name: str, found: Sequence[str]) -> Category:
        return Category.fit(
            name,
            found,
            min_count=self.min_count,
            most=self.max_categories,
            missing=self.missing == "impute",
        )

    def _number(self, name: str, values: np.ndarray, boolean: bool) -> Number:
        if np.isnan(values).all():
            raise UserError(_without_cells(name))
        return Number.fit(
            name,
            values,
            boolean=boolean,
            fill=self.fill if self.missing == "impute" else None,
            indicator=name in self.indicators,
        )

    def _column(self, file: Cells, index: np.ndarray, name: str) -> list[str]:
        found = file.column(name, index)
        if not self.missing_values:
            return found
        return ["" if self._empty(cell) else cell for cell in found]

    def _kind(self, file: Cells, good: np.ndarray, name: str) -> Kind:
        found = [cell for cell in self._column(file, good, name) if cell]
        if not found:
            raise UserError(f"{file.source}: {_without_cells(name)}")
        if name in self.categories or (name in file.classes and name not in self.numbers):
            return "category"
        kind = kind_of(found)
        if kind == "category" and name in self.indicators and name not in self.numbers:
            raise UserError(f"{file.source}: column {name}, which indicators names, is no number")
        return "number" if kind == "category" and name in self.numbers else kind

    def _read(self, file: Cells, index: np.ndarray, name: str, boolean: bool) -> np.ndarray:
        """A column's numbers [rows of index], NaN where one is missing, or its row bad."""
        at = np.flatnonzero(~file.bad[index])
        rows = index[at]
        found = self._column(file, rows, name)
        values = np.full(len(index), np.nan)
        values[at] = parsed(name, found, boolean, lambda i, why: file.refuse(int(rows[i]), why))
        return values

    def _encoded(
        self, transform: Transform, file: Cells, index: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of rows of a file, 0 where they are bad."""
        good = index[~file.bad[index]]

        def refuse(i: int, reason: str) -> None:
            file.refuse(int(good[i]), reason)

        columns = {c.name: self._column(file, good, c.name) for c in transform.columns}
        labels = self._column(file, good, self.target)
        found = transform.encode(columns, refuse), transform.targets(labels, refuse)
        inputs = np.zeros((len(index), len(transform.inputs)), np.float32)
        targets = np.zeros((len(index), *found[1].shape[1:]), found[1].dtype)
        fine = ~file.bad[good]
        at = np.flatnonzero(~file.bad[index])
        inputs[at], targets[at] = found[0][fine], found[1][fine]
        return inputs, targets

    def _holes(self, file: Cells, index: np.ndarray, names: Sequence[str]) -> list[str]:
        good = index[~file.bad[index]]
        counts = {name: self._column(file, good, name).count("") for name in names}
        found = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
        return [f"cells missing among training rows: {found}"] if found else []

    def _described(self, transform: Transform, splits: Mapping[str, Examples]) -> list[str]:
        target = f"target {self.target}: "
        if transform.classes is None:
            target += "a number"
        else:
            target += f"{len(transform.classes)} classes, {', '.join(transform.classes)}"
        lines = [
            ", ".join(f"{len(split)} rows to {name}" for name, split in splits.items()),
            target,
        ]
        kinds: dict[str, list[str]] = {"numbers": [], "truth values": [], "categories": []}
        for column in transform.columns:
            if isinstance(column, Category):
                kinds["categories"].append(f"{column.name} ({len(column.words)})")
            else:
                kinds["truth values" if column.boolean else "numbers"].append(column.name)
        lines += [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        return [*lines, f"{len(transform.inputs)} inputs; scales and categories in table.json"]


def _without_cells(name: str) -> str:
    return f"column {name} has no cell in any training row: add it to ignore"
