"""Text from files: to predict, token by token, and to classify."""

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
from research.data import files
from research.data.bad import Bad, Checked
from research.data.splits import Splits, Streams, Windows
from research.data.tokens import BPE, Bytes, Characters, Kind, Tokenizer, Words, dumps, lines

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
        share = None if self.validation else self.validation_share
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
