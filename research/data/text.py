"""Text from files: to predict, token by token, and to classify."""

import csv
import dataclasses
import functools
import io
import itertools
import json
import pathlib
import re
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Interval

from research import UserError
from research.data import files
from research.data.bad import Bad, Checked
from research.data.splits import Examples, Splits, Streams, Windows
from research.data.tokens import (
    BPE,
    PADDING,
    UNKNOWN,
    Bytes,
    Characters,
    Kind,
    Tokenizer,
    Words,
    dumps,
    lines,
)

ROWS: dict[str, Any] = {"windows": Windows, "streams": Streams}
"""How rows of a batch are cut from tokens, by the name that `Text.rows` has for it."""

_INVALID = re.compile("[\udc80-\udcff]")
"""Bytes that are no UTF-8, as they are decoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Checked):
    """Language modelling on files of UTF-8: inputs, targets: [batch, length] int32.

    The vocabulary comes from the training text. Tokens are kept in the cache, and mapped. A bad
    line is one that is not UTF-8 (bytes have none) or that has a character which training lacks;
    where it is skipped its tokens are not predicted.
    """

    train: str
    """The training file, below $ERGON_DATA where it is not found as it is named."""
    validation: str | None = None
    test: str | None = None
    validation_share: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    """Of the training file's characters, the last; where there is no validation file. Words are
    divided at the end of a line."""
    tokens: Kind
    """words: <unk>, <eos> at the end of every line, and what stands between white space; bpe: byte
    pairs, of the package `tokenizers`."""
    vocab: Annotated[int, Ge(1)] | None = None
    """Tokens at most: of words the most frequent (None: all), of bpe what it is trained for."""
    unknown: bool = False
    """A character that training lacks is a token of its own, the last; False: its line is bad."""
    length: Annotated[int, Ge(1)]
    """Tokens predicted in a row of a batch."""
    rows: Literal["windows", "streams"] = "windows"
    """streams: rows continue from batch to batch, for models that carry their state."""

    def __post_init__(self) -> None:
        least = {"words": 3, "bpe": 256}.get(self.tokens)
        if least is None and self.vocab is not None:
            raise ValueError(f"vocab is chosen for words and bpe, and tokens is {self.tokens}")
        if self.vocab is not None and least is not None and self.vocab < least:
            raise ValueError(f"vocab of {self.tokens} must be {least} or more, not {self.vocab}")
        if self.tokens == "bpe" and self.vocab is None:
            raise ValueError("tokens = bpe needs vocab")
        if self.unknown and self.tokens != "characters":
            raise ValueError(f"unknown is chosen for characters, and tokens is {self.tokens}")

    def load(self) -> Splits:
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        paths = {name: files.find(path) for name, path in given.items() if path is not None}
        share = self.validation_share if self.validation is None else None
        options = [share, self.tokens, self.vocab, self.unknown, self.on_bad, self.max_bad]
        key = ["text", list(paths), files.stamp(*paths.values()), options]
        folder = files.cached(key, functools.partial(self._make, paths))
        arrays = files.mapped(folder)
        return Splits(
            {
                name: ROWS[self.rows](arrays[name], self.length, arrays.get(f"{name}.bad"))
                for name in ("train", "validation", "test")
                if name in arrays
            },
            {"tokenizer.json": (folder / "tokenizer.json").read_text()},
            json.loads((folder / "notes.json").read_text()),
        )

    def _make(self, paths: dict[str, pathlib.Path], folder: pathlib.Path) -> None:
        bad = self.bad()
        parts = {name: _Part(path, _read(path)) for name, path in paths.items()}
        if "validation" not in parts:
            parts |= _divided(parts["train"], self.validation_share, self.tokens == "words")
        if self.tokens != "bytes":
            for part in parts.values():
                part.check(bad)
        if not parts["train"].good():
            raise UserError(f"{parts['train'].path} has no line to train on")
        tokenizer = self._tokenizer(parts["train"].good())
        for name, part in parts.items():
            if isinstance(tokenizer, Characters):
                part.fit(tokenizer, bad)
            encoded, skipped = part.encoded(tokenizer)
            if len(encoded) < 2:
                raise UserError(f"{part.path}: {name} has {len(encoded)} tokens, and needs 2")
            if skipped.all():
                raise UserError(f"{part.path}: every line of {name} is bad")
            np.save(folder / f"{name}.npy", encoded)
            if self.on_bad == "skip":
                np.save(folder / f"{name}.bad.npy", skipped)
        (folder / "tokenizer.json").write_text(dumps(tokenizer))
        (folder / "notes.json").write_text(json.dumps(bad.notes()))

    def _tokenizer(self, training: list[str]) -> Tokenizer:
        match self.tokens:
            case "bytes":
                return Bytes()
            case "characters":
                return Characters.of(training, self.unknown)
            case "words":
                return Words.of(training, vocab=self.vocab)
            case "bpe":
                return BPE.of(training, self.vocab or 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledText(Checked):
    """Classification of texts from files with a header: .tsv (cells as they are) or .csv (quoted).

    inputs: [batch, length] int32, words padded with 0; lengths, targets: [batch] int32. The
    vocabulary comes from the training rows: <pad>, <unk>, then words. A bad row has another number
    of cells than the header, text that is empty or not UTF-8, or a label that is no integer from 0
    or that no training row has.
    """

    train: str
    """The training file, below $ERGON_DATA where it is not found as it is named."""
    validation: str | None = None
    test: str | None = None
    validation_share: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    """Of each class's training rows; where there is no validation file."""
    split: Annotated[int, Ge(0)] = 0
    """Seed of that division."""
    text: str = "text"
    """The column of texts."""
    label: str = "label"
    """The column of labels."""
    length: Annotated[int, Ge(1)]
    """Words of a row; what a longer text has beyond them is cut."""
    lower: bool = False
    """Capitals are small letters."""
    vocab: Annotated[int, Ge(3)] | None = None
    """Words at most, with <pad> and <unk>: the most frequent; None: all."""
    min_count: Annotated[int, Ge(1)] = 1
    """Times that training rows must have a word."""

    def load(self) -> Splits:
        bad = self.bad()
        rows = self.rows(bad)
        good = [text for text, label in rows["train"] if label is not None]
        words = Words.of(good, (PADDING, UNKNOWN), self.vocab, self.min_count, self.lower)
        parts = {name: self._encoded(given, words) for name, given in rows.items()}
        return Splits(parts, {"tokenizer.json": dumps(words)}, bad.notes())

    def rows(self, bad: Bad) -> dict[str, list[tuple[str, int | None]]]:
        """Texts and labels by split, as they are in the files; a bad row has no label."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        paths = {name: files.find(path) for name, path in given.items() if path is not None}
        tables = {name: _Table(path) for name, path in paths.items()}
        for table in tables.values():
            table.check(tables["train"], (self.label, self.text))
        found = {
            name: [self._row(table, where, cells, bad) for where, cells in table.rows]
            for name, table in tables.items()
        }
        classes = {label for _, label in found["train"]} - {None}
        for name, table in tables.items():
            for i, (text, label) in enumerate(found[name]):
                if label not in {*classes, None}:
                    bad(table.rows[i][0], f"no training row has the label {label}")
                    found[name][i] = text, None
            if all(label is None for _, label in found[name]):
                raise UserError(f"{table.path}: {name} has no row that can be read")
        if "validation" not in found:
            found |= self._divided(found["train"])
            if not found["validation"]:
                raise UserError(
                    f"{paths['train']}: validation_share = {self.validation_share} of each class "
                    "is no row"
                )
        return {name: found[name] for name in ("train", "validation", "test") if name in found}

    def _row(
        self, table: "_Table", where: str, cells: list[str], bad: Bad
    ) -> tuple[str, int | None]:
        if len(cells) != len(table.header):
            bad(where, f"{len(cells)} cells, and the header has {len(table.header)}")
            return "", None
        label, text = (cells[table.header.index(name)] for name in (self.label, self.text))
        if any(map(_INVALID.search, cells)):
            bad(where, "not UTF-8")
        elif not text.split():
            bad(where, "the text is empty")
        elif not re.fullmatch("[0-9]{1,9}", label.strip()):
            bad(where, f"a label is an integer from 0, not {label!r}")
        else:
            return text, int(label)
        return text, None

    def _divided(
        self, rows: list[tuple[str, int | None]]
    ) -> dict[str, list[tuple[str, int | None]]]:
        """train and validation, a share of each class; both in the file's order."""
        rng = np.random.default_rng(self.split)
        places: dict[int | None, list[int]] = {}
        for i, (_, label) in enumerate(rows):
            places.setdefault(label, []).append(i)
        held = {
            int(i)
            for of_class in places.values()
            for i in rng.permutation(of_class)[: int(len(of_class) * self.validation_share)]
        }
        return {
            "train": [row for i, row in enumerate(rows) if i not in held],
            "validation": [row for i, row in enumerate(rows) if i in held],
        }

    def _encoded(self, rows: list[tuple[str, int | None]], words: Words) -> Examples:
        inputs = np.zeros((len(rows), self.length), np.int32)
        lengths, targets = np.zeros((2, len(rows)), np.int32)
        for i, (text, label) in enumerate(rows):
            if label is not None:
                ids = words.encode(text)[: self.length]
                inputs[i, : len(ids)], lengths[i], targets[i] = ids, len(ids), label
        found = {"inputs": inputs, "lengths": lengths, "targets": targets}
        if self.on_bad == "skip":
            found["bad"] = np.array([label is None for _, label in rows])
        return Examples(found)


class _Table:
    """A file of cells: its header, and its rows with their places."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        if path.suffix not in (".tsv", ".csv"):
            raise UserError(f"{path} must be a .tsv or a .csv")
        text = _read(path).removeprefix("\ufeff")
        tabs: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, **tabs)
        self.header: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []
        first = 1
        try:
            for cells in reader:
                if self.header:
                    self.rows.append((f"{path}, line {first}", cells))
                else:
                    self.header = cells
                first = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {first}: {error}") from None
        if not self.rows:
            raise UserError(f"{path} has no rows")

    def check(self, other: "_Table", columns: tuple[str, ...]) -> None:
        """Raises UserError where a column is not there, or not the same as in the other file."""
        for column in columns:
            if column not in self.header:
                raise UserError(
                    f"{self.path} has no column {column!r}; it has {', '.join(self.header)}"
                )
        if self.header != other.header:
            raise UserError(
                f"{self.path} has the columns {', '.join(self.header)}, and {other.path} "
                f"{', '.join(other.header)}"
            )


class _Part:
    """The lines of a file, or of a part of it, that a split is of; and which of them are bad."""

    def __init__(self, path: pathlib.Path, text: str, first: int = 1) -> None:
        """first: the number of the first line."""
        self.path, self.text, self.first = path, text, first
        self.lines = lines(text)
        self.bad = [False] * len(self.lines)

    def good(self) -> list[str]:
        return [line for line, bad in zip(self.lines, self.bad, strict=True) if not bad]

    def check(self, bad: Bad) -> None:
        """Finds lines that are not UTF-8, and makes them so."""
        if not _INVALID.search(self.text):
            return
        for i, line in enumerate(self.lines):
            if _INVALID.search(line):
                self._found(i, _INVALID.sub("\ufffd", line), "not UTF-8", bad)

    def fit(self, characters: Characters, bad: Bad) -> None:
        """Finds lines with characters that are not to be encoded, and gives them others."""
        if characters.missing(self.text) is None:
            return
        for i, line in enumerate(self.lines):
            missing = characters.missing(line)
            if missing is not None:
                spare = characters.alphabet[0]
                known = "".join(c if c in characters.alphabet else spare for c in line)
                self._found(i, known, f"the training text has no character {missing!r}", bad)

    def _found(self, i: int, line: str, reason: str, bad: Bad) -> None:
        if not self.bad[i]:
            bad(f"{self.path}, line {self.first + i}", reason)
        self.lines[i], self.bad[i] = line, True

    def encoded(self, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, in the smallest dtype that holds all there are, and which are of bad lines."""
        dtype = np.min_scalar_type(tokenizer.size - 1)
        found, skipped = [np.zeros(0, dtype)], [np.zeros(0, bool)]
        for bad, run in itertools.groupby(range(len(self.lines)), self.bad.__getitem__):
            ids = tokenizer.encode("".join(self.lines[i] for i in run))
            found.append(ids.astype(dtype))
            skipped.append(np.full(len(ids), bad))
        return np.concatenate(found), np.concatenate(skipped)


def _read(path: pathlib.Path) -> str:
    """A file's text. Bytes that are no UTF-8 are surrogates, which no text has."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _divided(part: _Part, share: float, at_a_line: bool) -> dict[str, _Part]:
    """train and validation: the last share of the characters, at_a_line whole lines."""
    text = part.text
    cut = int(len(text) * (1 - share))
    if at_a_line:
        cut = text.find("\n", cut) + 1 or len(text)
    line = text.count("\n", 0, cut) + 1
    return {
        "train": _Part(part.path, text[:cut]),
        "validation": _Part(part.path, text[cut:], line),
    }
