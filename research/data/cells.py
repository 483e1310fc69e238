"""The cells of a table, as text: CSV by the csv module, Parquet by pyarrow, and what
`research.data.tfds.read_table` gives of a TFDS data set. Empty: missing."""

import csv
import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from research import UserError
from research.data.bad import Bad

SEPARATORS = {".csv": ",", ".txt": ",", ".data": ",", ".tsv": "\t", ".tab": "\t"}
PARQUET = (".parquet", ".pq")
Row = Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """A table's rows, each with its place. A row that cannot be read is None, and bad."""

    source: str
    """What the table is read from, as messages name it."""
    names: list[str]
    rows: list[Row | None]
    places: list[int]
    locate: Callable[[int], str]
    """The file and row, in words, of a place."""
    skip: Bad
    bad: np.ndarray
    """Which rows are bad, as far as is known."""
    classes: Mapping[str, tuple[str, ...]]
    """Of columns that are declared to be of classes, those classes in the order of their
    numbers."""

    @classmethod
    def of(
        cls,
        source: str,
        names: list[str],
        rows: "Places",
        locate: Callable[[int], str],
        skip: Bad,
        classes: Mapping[str, tuple[str, ...]],
    ) -> "Cells":
        """Raises UserError for a row that is bad, where none may be."""
        read: list[Row | None] = []
        places: list[int] = []
        reasons: dict[int, str] = {}
        for place, row in rows:
            if isinstance(row, str):
                reasons[len(read)] = row
            read.append(None if isinstance(row, str) else row)
            places.append(place)
        bad = np.zeros(len(read), bool)
        found = cls(source, names, read, places, locate, skip, bad, classes)
        for i, reason in reasons.items():
            found.refuse(i, reason)
        return found

    def __len__(self) -> int:
        return len(self.rows)

    def refuse(self, i: int, reason: str) -> None:
        """Counts row i as bad, once. Raises UserError where no row may be."""
        if not self.bad[i]:
            self.bad[i] = True
            self.skip(self.where(i), reason)

    def where(self, i: int) -> str:
        return self.locate(self.places[i])

    def column(self, name: str, index: np.ndarray) -> list[str]:
        """A column's cells in rows that are not bad."""
        at = self.names.index(name)
        return [row[at] for i in index if (row := self.rows[i]) is not None]

    def without(self, dropped: np.ndarray) -> "Cells":
        kept = np.flatnonzero(~dropped)
        rows, places = [self.rows[i] for i in kept], [self.places[i] for i in kept]
        return dataclasses.replace(self, rows=rows, places=places, bad=self.bad[kept])


def text(value: Any) -> str:
    """A cell's value as text, bytes being UTF-8; None as an empty cell."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.decode().strip()
    if isinstance(value, float | np.floating) and value == int_of(value):
        return str(int_of(value))
    return str(value).strip()


def int_of(value: Any) -> int | None:
    """A whole number that floating point holds exactly."""
    return int(value) if abs(value) < 2**53 and value == int(value) else None


Named = Mapping[str, Collection[str]]
"""Columns that there must be, by the fields that name them."""


def read(
    path: pathlib.Path,
    separator: str | None,
    skip: Bad,
    *,
    named: Named,
    quotes: bool = True,
) -> Cells:
    """Reads a table whose first row names its columns.

    separator: between the cells of a line; None: by the file's ending. quotes: a cell may stand in
    quotes; False: quotes are characters as others are. Raises UserError for a file that is no
    table, or lacks a column.
    """
    if not path.is_file():
        raise UserError(f"{path} is a folder, and not a table")
    if path.suffix.lower() in PARQUET:
        names, rows, unit = *_parquet(path), "row"
    else:
        between = separator or SEPARATORS.get(path.suffix.lower())
        if between is None:
            known = ", ".join((*SEPARATORS, *PARQUET))
            raise UserError(f"{path} ends in none of {known}: give its separator")
        names, rows, unit = *_csv(path, between, quotes), "line"
    for i, name in enumerate(names):
        if not name:
            raise UserError(f"{path}: column {i + 1} has no name")
        if name in names[:i]:
            raise UserError(f"{path}: two columns are named {name}")
    require(str(path), names, named)
    return Cells.of(str(path), names, rows, lambda place: f"{path}, {unit} {place}", skip, {})


def require(source: str, names: Collection[str], named: Named) -> None:
    """Raises UserError where a column that a field names is not there."""
    for field, columns in named.items():
        for column in columns:
            if column not in names:
                raise UserError(
                    f"{source} has no column {column}, which {field} names; "
                    f"it has {', '.join(names)}"
                )


Places = Iterator[tuple[int, Row | str]]
"""Rows by their places; or what is wrong with one."""


def _csv(path: pathlib.Path, separator: str, quotes: bool) -> tuple[list[str], Places]:
    rows = _lines(path, separator, quotes)
    place, names = next(rows, (1, "the file is empty"))
    if isinstance(names, str):
        raise UserError(f"{path}, line {place}: {names}")

    def checked() -> Places:
        for place, row in rows:
            if not isinstance(row, str) and len(row) != len(names):
                cells = f"{len(row)} cell{'s' * (len(row) != 1)}"
                row = f"{cells}, and the header has {len(names)}"
            yield place, row

    return list(names), checked()


def _lines(path: pathlib.Path, separator: str, quotes: bool) -> Places:
    """The rows of a CSV by the lines they begin in. Empty lines are none."""
    # Bytes that are not UTF-8 are let through to be found in their row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
        while True:
            place = reader.line_num + 1
            try:
                row = next(reader)
                "".join(row).encode()
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):  # the rest of the file is within this row
                    raise UserError(f"{path}, line {place}: a quote is not closed") from None
                yield place, str(error)
            except UnicodeEncodeError:
                yield place, "not UTF-8"
            else:
                if row:
                    yield place, tuple(cell.strip() for cell in row)


def _parquet(path: pathlib.Path) -> tuple[list[str], Places]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} is read by pyarrow, which is not installed: pip install 'ergon[parquet]'"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from None
    columns = [list(map(_decoded, column)) for column in table.columns]
    return list(table.column_names), enumerate(map(_whole, zip(*columns, strict=True)), start=1)


def _decoded(scalar: Any) -> str | None:
    """None where it is not UTF-8."""
    try:
        return text(scalar.as_py())
    except UnicodeDecodeError:
        return None


def _whole(row: Sequence[str | None]) -> Row | str:
    return "not UTF-8" if None in row else tuple(cell or "" for cell in row)


def columns(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]], names: Sequence[str]
) -> dict[str, list[str]]:
    """The named columns of raw rows, or of columns, as text.

    Raises UserError for a column that is absent, or bytes that are no text.
    """
    try:
        return _columns(rows, names)
    except UnicodeDecodeError:
        raise UserError("a cell has bytes that are not UTF-8") from None


def _columns(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]], names: Sequence[str]
) -> dict[str, list[str]]:
    if isinstance(rows, Mapping):
        for name in names:
            if name not in rows:
                raise UserError(f"the rows have no column {name}")
        if len({len(rows[name]) for name in names}) > 1:
            raise UserError("the columns are not of one length")
        return {name: list(map(text, rows[name])) for name in names}
    for i, row in enumerate(rows):
        for name in names:
            if name not in row:
                raise UserError(f"row {i} has no column {name}")
    return {name: [text(row[name]) for row in rows] for name in names}


Refuse = Callable[[int, str], None]
"""Called with a row's number, and what is wrong with it."""
