"""Text from files: to predict, token by token, and to classify."""

import copy
import dataclasses
import functools
import itertools
import json
import pathlib
import re
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Interval

from research import UserError
from research.data import cells, files, packed
from research.data.bad import Bad
from research.data.cells import Cells
from research.data.splits import Examples, Split, Splits, Streams, Windows, zeros
from research.data.tfds import FilesOrTFDS, Texts, read_table
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
)

_INVALID = re.compile("[\udc80-\udcff]")
"""Bytes that are no UTF-8, as they are decoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(FilesOrTFDS):
    """Language modelling on files of UTF-8, or on a text feature of TFDS's, of which a row is what
    a line is of a file. inputs, targets: [batch, length] int32.

    The vocabulary comes from the training text. Tokens are kept in the cache, and mapped. A bad
    line is one that is not UTF-8 (bytes have none) or that has a character which training lacks;
    where it is skipped its tokens are not predicted.
    """

    train: str
    """The training file, below $ERGON_DATA where it is not found as it is named."""
    validation: str | None = None
    test: str | None = None
    feature: str | None = None
    """Of a TFDS data set; None: its only text."""
    validation_share: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    """Of the training text's characters, the last; where there is no validation text. Words,
    documents and the rows of TFDS stay whole."""
    tokens: Kind
    """words: <unk>, <eos> at the end of every line, and what stands between white space; bpe: byte
    pairs, of the package `tokenizers`."""
    vocab: Annotated[int, Ge(1)] | None = None
    """Tokens at most: of words the most frequent (None: all), of bpe what it is trained for."""
    unknown: bool = False
    """A character that training lacks is a token of its own, the last; False: its line is bad."""
    length: Annotated[int, Ge(1)]
    """Tokens predicted in a row of a batch."""
    rows: Literal["windows", "streams", "packed"] = "windows"
    """streams: rows continue from batch to batch, for models that carry their state. packed: whole
    documents side by side, for models that keep them apart (`research.data.packed`)."""
    documents: Literal["line", "blank_line"] = "line"
    """What ends a document that is packed: a line (or row), or lines with nothing on them."""

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
        read = _File if self.tfds is None else self._texts
        sources: dict[str, Any] = {name: read(at) for name, at in given.items() if at is not None}
        share = None if self.validation else self.validation_share
        packing = self.documents if self.rows == "packed" else None
        options = [share, self.tokens, self.vocab, self.unknown, self.on_bad, self.max_bad]
        keys = {name: source.key() for name, source in sources.items()}
        key = ["text", keys, options, packing, self.length if packing else None]
        folder = files.cached(key, functools.partial(self._make, sources))
        arrays = files.mapped(folder)
        with files.whole(folder):
            tokenizer = (folder / "tokenizer.json").read_text()
            notes = json.loads((folder / "notes.json").read_text())
        names = [name for name in ("train", "validation", "test") if name in arrays]
        splits: dict[str, Split] = {name: self._split(arrays, name) for name in names}
        return Splits(splits, {"tokenizer.json": tokenizer}, notes)

    def outline(self, rows: int) -> Splits:
        """As `research.data.outline` has it."""
        row = self.length + 1  # of which the first is in no target
        tokens = zeros(np.uint8, rows * row)
        arrays = {"": tokens}
        if self.on_bad == "skip":
            arrays[".bad"] = zeros(bool, len(tokens))
        if self.rows == "packed":
            index = packed.index(np.arange(rows + 1) * row, self.length)
            arrays |= {f".{key}": array for key, array in index.items()}
        names = ["train", "validation", *(["test"] if self.test else [])]
        return Splits(
            {name: self._split({name + k: v for k, v in arrays.items()}, name) for name in names},
            {},
        )

    def _texts(self, split: str) -> Texts:
        return Texts(self.tfds or "", self.data_dir, split, self.feature)

    def _split(self, arrays: dict[str, np.ndarray], name: str) -> Split:
        tokens, bad = arrays[name], arrays.get(f"{name}.bad")
        if self.rows == "packed":
            index = {key: arrays[f"{name}.{key}"] for key in ("starts", "sizes", "rows")}
            return packed.Packed(tokens, self.length, **index, bad=bad)
        kind = Windows if self.rows == "windows" else Streams
        return kind(tokens, self.length, bad)

    def _make(self, sources: dict[str, Any], folder: pathlib.Path) -> None:
        bad = self.bad()
        parts = {name: _Part(source) for name, source in sources.items()}
        if "validation" not in parts:
            whole = self.tokens == "words" or self.rows == "packed" or self.tfds is not None
            parts |= _divided(parts["train"], self.validation_share, whole)
        if self.tokens != "bytes":
            for part in parts.values():
                part.check(bad)
        if not parts["train"].good():
            raise UserError(f"{parts['train'].name} has no line to train on")
        tokenizer = self._tokenizer(parts["train"].good())
        notes = []
        for name, part in parts.items():
            if isinstance(tokenizer, Characters):
                part.fit(tokenizer, bad)
            by = self.documents if self.rows == "packed" else None
            encoded, skipped, offsets = part.encoded(tokenizer, by)
            if len(encoded) < 2:
                raise UserError(f"{part.name}: {name} has {len(encoded)} tokens, and needs 2")
            if skipped.all():
                raise UserError(f"{part.name}: every line of {name} is bad")
            np.save(folder / f"{name}.npy", encoded)
            if self.on_bad == "skip":
                np.save(folder / f"{name}.bad.npy", skipped)
            if by is not None:
                for key, array in packed.index(offsets, self.length).items():
                    np.save(folder / f"{name}.{key}.npy", array)
                notes.append(f"{name}: {len(offsets) - 1:,} documents packed")
        (folder / "tokenizer.json").write_text(dumps(tokenizer))
        (folder / "notes.json").write_text(json.dumps([*bad.notes(), *notes]))

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
class LabelledText(FilesOrTFDS):
    """Classification of texts from .tsv (cells as they are), .csv or .parquet, with a header, or
    from TFDS.

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
    """Of each class's training rows; where there is no validation file, or split."""
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

    def __post_init__(self) -> None:
        if self.text == self.label:
            raise UserError(f"text and label are both the column {self.text}")

    def load(self) -> Splits:
        bad = self.bad()
        rows = self.rows(bad)
        good = [text for text, label in rows["train"] if label is not None]
        words = Words.of(good, (PADDING, UNKNOWN), self.vocab, self.min_count, self.lower)
        parts = {name: self._encoded(given, words) for name, given in rows.items()}
        return Splits(parts, {"tokenizer.json": dumps(words)}, bad.notes())

    def outline(self, rows: int) -> Splits:
        """As `research.data.outline` has it."""
        found = {"inputs": zeros(np.int32, rows, self.length)}
        found |= {name: zeros(np.int32, rows) for name in ("lengths", "targets")}
        if self.on_bad == "skip":
            found["bad"] = zeros(bool, rows)
        names = ["train", "validation", *(["test"] if self.test else [])]
        return Splits({name: Examples(found) for name in names}, {})

    def rows(self, bad: Bad) -> dict[str, list[tuple[str, int | None]]]:
        """Texts and labels by split, in the files' order; a bad row has no label."""
        given = {"train": self.train, "validation": self.validation, "test": self.test}
        tables = {name: self._cells(at, bad) for name, at in given.items() if at is not None}
        for table in tables.values():
            self._check(table, tables["train"])
        found = {
            name: [self._row(table, i) for i in range(len(table))] for name, table in tables.items()
        }
        classes = {label for _, label in found["train"]} - {None}
        for name, table in tables.items():
            for i, (text, label) in enumerate(found[name]):
                if label not in {*classes, None}:
                    table.refuse(i, f"no training row has the label {label}")
                    found[name][i] = text, None
            if table.bad.all():
                raise UserError(f"{table.source}: {name} has no row that can be read")
        if "validation" not in found:
            found |= self._divided(found["train"])
            if not found["validation"]:
                raise UserError(
                    f"{tables['train'].source}: validation_share = {self.validation_share} of "
                    "each class is no row"
                )
        return {name: found[name] for name in ("train", "validation", "test") if name in found}

    def _cells(self, at: str, bad: Bad) -> Cells:
        named = {"label": (self.label,), "text": (self.text,)}
        if self.tfds is None:
            path = files.find(at)
            return cells.read(path, None, bad, named=named, quotes=path.suffix != ".tsv")
        return read_table(
            self.tfds,
            self.data_dir,
            at,
            bad,
            named=named,
            wanted=(self.label, self.text).__contains__,
            numbers=True,
        )

    def _check(self, table: Cells, train: Cells) -> None:
        """Raises UserError where columns are not those of training, or there are no rows."""
        if table.names != train.names:
            raise UserError(
                f"{table.source} has the columns {', '.join(table.names)}, and {train.source} "
                f"{', '.join(train.names)}"
            )
        if not len(table):
            raise UserError(f"{table.source} has no rows")

    def _row(self, table: Cells, i: int) -> tuple[str, int | None]:
        if table.bad[i]:
            return "", None
        label, text = (table.column(name, np.array([i]))[0] for name in (self.label, self.text))
        if not text:
            table.refuse(i, "the text is empty")
        elif not re.fullmatch("[0-9]{1,9}", label):
            table.refuse(i, f"a label is an integer from 0, not {label!r}")
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


class _File:
    """A file's lines; only a line feed ends one."""

    def __init__(self, path: str) -> None:
        self.path = self.name = files.find(path)

    def rows(self) -> list[bytes]:
        try:
            return re.findall(rb"[^\n]*\n|[^\n]+", self.path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None

    def where(self, i: int) -> str:
        return f"{self.path}, line {i + 1}"

    def key(self) -> list[Any]:
        return files.stamp(self.path)


class _Part:
    """The lines of a source, or of a part of it, that a split is of; and which of them are bad."""

    def __init__(self, source: Any) -> None:
        self.name, self._source, self._first = source.name, source, 0
        # Bytes that are no UTF-8 are surrogates, which no text has.
        self.lines = [row.decode("utf-8", "surrogateescape") for row in source.rows()]
        self.bad = [False] * len(self.lines)

    def of(self, lines: list[str], first: int) -> "_Part":
        """Some of the lines, of which the first has that number."""
        part = copy.copy(self)
        part.lines, part.bad, part._first = lines, [False] * len(lines), first
        return part

    def good(self) -> list[str]:
        return [line for line, bad in zip(self.lines, self.bad, strict=True) if not bad]

    def check(self, bad: Bad) -> None:
        """Finds lines that are not UTF-8, and makes them so."""
        for i, line in enumerate(self.lines):
            if _INVALID.search(line):
                self._found(i, _INVALID.sub("\ufffd", line), "not UTF-8", bad)

    def fit(self, characters: Characters, bad: Bad) -> None:
        """Finds lines with characters that are not to be encoded, and gives them others."""
        for i, line in enumerate(self.lines):
            missing = characters.missing(line)
            if missing is not None:
                spare = characters.alphabet[0]
                known = "".join(c if c in characters.alphabet else spare for c in line)
                self._found(i, known, f"the training text has no character {missing!r}", bad)

    def _found(self, i: int, line: str, reason: str, bad: Bad) -> None:
        if not self.bad[i]:
            bad(self._source.where(self._first + i), reason)
        self.lines[i], self.bad[i] = line, True

    def encoded(
        self, tokenizer: Tokenizer, by: Literal["line", "blank_line"] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, in the smallest dtype that holds all there are; which of them are of bad lines;
        and where documents begin, and the end."""
        dtype = np.min_scalar_type(tokenizer.size - 1)
        found, skipped = [np.zeros(0, dtype)], [np.zeros(0, bool)]
        offsets, size = [0], 0
        document = self._documents(by)
        runs = itertools.groupby(range(len(self.lines)), lambda i: (document[i], self.bad[i]))
        for (n, bad), run in runs:
            ids = tokenizer.encode("".join(self.lines[i] for i in run))
            offsets += [size] * (n + 1 - len(offsets))
            size += len(ids)
            found.append(ids.astype(dtype))
            skipped.append(np.full(len(ids), bad))
        return np.concatenate(found), np.concatenate(skipped), np.array([*offsets, size])

    def _documents(self, by: Literal["line", "blank_line"] | None) -> list[int]:
        """The number of each line's document. An empty line ends the one before it."""
        if by != "blank_line":
            return [0] * len(self.lines) if by is None else list(range(len(self.lines)))
        there = [bool(line.strip()) for line in self.lines]
        begins = [now and not before for before, now in itertools.pairwise([True, *there])]
        return list(itertools.accumulate(map(int, begins)))


def _divided(part: _Part, share: float, whole: bool) -> dict[str, _Part]:
    """train and validation: the last share of the characters, or of whole lines with as many."""
    ends = np.cumsum([len(line) for line in part.lines])
    cut = int((ends[-1] if len(ends) else 0) * (1 - share))
    i = int(np.searchsorted(ends, cut, side="right"))
    head = part.lines[:i]
    rest = part.lines[i:]
    inside = cut - (int(ends[i - 1]) if i else 0)
    first = i
    if rest and inside:
        if whole:
            head, rest, first = [*head, rest[0]], rest[1:], i + 1
        else:
            head, rest = [*head, rest[0][:inside]], [rest[0][inside:], *rest[1:]]
    return {"train": part.of(head, 0), "validation": part.of(rest, first)}
