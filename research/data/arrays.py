"""Arrays of a notebook as a data set."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from research import UserError
from research.data.splits import Examples

MADE = {"weights", "bad", "reset"}
"""Keys of a batch that are made, and not given."""


class Rows(Mapping[str, np.ndarray]):
    """Arrays by name, copied, and equal to others of the same bytes: a value, as a config is."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)
        for array in self._arrays.values():
            array.setflags(write=False)
        self._mark = tuple((k, str(v.dtype), v.shape, sha256(v)) for k, v in self.items())

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self._mark == other._mark

    def __hash__(self) -> int:
        return hash(self._mark)

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{k}: {outline(v)}" for k, v in self.items()) + "}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
    """Splits of arrays whose first axis is the example, copied as they are given.

    Arrays(train={"inputs": x, "targets": y}, validation=...): float64 becomes float32 and int64
    int32, as do integers and truth values that are targets; tasks take inputs of uint8 as images,
    in [0, 1]. A run's config.json has their SHA-256 in their place: such a run goes on in the
    notebook that has them.

    Raises UserError for what is no number, NaN, too large, or of differing lengths.
    """

    train: Mapping[str, Any]
    """inputs and targets, [rows, ...]; and lengths [rows], where inputs are padded in time."""
    validation: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for split, given in vars(self).items():
            if given is not None and not isinstance(given, Rows):
                object.__setattr__(self, split, _rows(split, given))
            held = getattr(self, split)
            if held is not None:
                _check_alike(split, held, self.train)

    def load(self) -> Mapping[str, Examples]:
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: Examples(dict(rows)) for name, rows in given.items() if rows is not None}


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def outline(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _rows(split: str, given: Any) -> Rows:
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise UserError(f"{split} must be arrays by name, such as inputs and targets, not {kind}")
    for name in ("inputs", "targets"):
        if name not in given:
            raise UserError(f"{split} has no {name}; it has {', '.join(map(str, given)) or 'none'}")
    if made := MADE & given.keys():
        raise UserError(f"{split} has {min(made)}, which rows of arrays cannot be given")
    arrays = {name: _array(f"{split}: {name}", array) for name, array in given.items()}
    n = len(arrays["targets"])
    for name, array in arrays.items():
        if len(array) != n:
            raise UserError(f"{split} has {n} rows of targets, and {len(array)} of {name}")
    if not n:
        raise UserError(f"{split} has no rows")
    return Rows(arrays)


def _array(name: str, given: Any) -> np.ndarray:
    """A copy in a type that a step computes with."""
    try:
        array = np.asarray(given)
    except ValueError as error:  # a list of lists of differing lengths
        raise UserError(f"{name} are no array: {str(error).splitlines()[0]}") from None
    if array.ndim < 1:
        raise UserError(f"{name} must be an array of rows, not {array}")
    target = name.endswith("targets")
    if np.issubdtype(array.dtype, np.floating):
        return _floats(name, array)
    if np.issubdtype(array.dtype, np.integer):
        small = array.dtype.itemsize < 4 and not target
        return np.array(array, order="C") if small else _integers(name, array)
    if array.dtype == bool:
        return np.array(array, np.int32 if target else bool, order="C")
    raise UserError(f"{name} are {array.dtype}, which is neither a number nor a truth value")


def _floats(name: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = np.array(array, np.float32, order="C")
    if (i := _first(~np.isfinite(array))) is not None:
        raise UserError(f"{name}, row {i[0]}: {array[i]} is not finite")
    if (i := _first(~np.isfinite(found))) is not None:
        raise UserError(f"{name}, row {i[0]}: {array[i]} is too large for float32")
    return found


def _integers(name: str, array: np.ndarray) -> np.ndarray:
    limits = np.iinfo(np.int32)
    if (i := _first((array < limits.min) | (array > limits.max))) is not None:
        raise UserError(f"{name}, row {i[0]}: {array[i]} is too large for int32")
    return np.array(array, np.int32, order="C")


def _first(wrong: np.ndarray) -> tuple[int, ...] | None:
    """The place of the first that is wrong."""
    if not wrong.any():
        return None
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))


def _check_alike(split: str, rows: Mapping[str, np.ndarray], train: Mapping[str, Any]) -> None:
    if rows.keys() != train.keys():
        raise UserError(f"{split} has {', '.join(rows)}, and train {', '.join(train)}")
    for name, array in rows.items():
        if (array.dtype, array.shape[1:]) != (train[name].dtype, train[name].shape[1:]):
            raise UserError(
                f"{split}: {name} are {outline(array)}, and train's {outline(train[name])}"
            )
