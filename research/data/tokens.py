"""Tokenizers: text as numbers and back. A vocabulary comes from training text alone.

Lines are encoded one after another: the tokens of a text are those of its lines, joined.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from research import UserError

Kind = Literal["bytes", "characters", "words", "bpe"]
UNKNOWN, END, PADDING = "<unk>", "<eos>", "<pad>"


class Tokenizer(Protocol):
    @property
    def size(self) -> int:
        """Tokens there are: 0 to size - 1."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """[tokens] int32."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The bytes of UTF-8. Bytes that are no UTF-8, which a file may have, stay what they are."""

    size: ClassVar[int] = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return np.asarray(ids, np.uint8).tobytes().decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Characters:
    """Characters by their places in a sorted alphabet."""

    alphabet: str
    unknown: bool = False
    """Every other character is the last token; False: it is refused."""

    @classmethod
    def of(cls, lines: Iterable[str], unknown: bool = False) -> "Characters":
        return cls("".join(sorted(set().union(*lines))), unknown)

    @property
    def size(self) -> int:
        return len(self.alphabet) + self.unknown

    def missing(self, text: str) -> str | None:
        """The first character of a text that cannot be encoded."""
        known = () if self.unknown else self._known
        return next((c for c in text if c not in known), None) if known else None

    def encode(self, text: str) -> np.ndarray:
        alphabet, codes = _codes(self.alphabet), _codes(text)
        places = np.minimum(np.searchsorted(alphabet, codes), len(alphabet) - 1)
        other = alphabet[places] != codes
        if other.any() and not self.unknown:
            raise UserError(f"the vocabulary has no character {text[int(other.argmax())]!r}")
        return np.where(other, len(alphabet), places).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        characters = self.alphabet + "\ufffd" * self.unknown
        return "".join(characters[i] for i in ids)

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.alphabet)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@dataclasses.dataclass(frozen=True)
class Words:
    """What stands between white space. A word that the vocabulary lacks is <unk>."""

    words: tuple[str, ...]
    """By their numbers, those of no text among them: <unk>, and <eos> or <pad>."""
    lower: bool = False
    """Capitals are small letters."""

    @classmethod
    def of(
        cls,
        lines: Iterable[str],
        special: tuple[str, ...] = (UNKNOWN, END),
        vocab: int | None = None,
        min_count: int = 1,
        lower: bool = False,
    ) -> "Words":
        """The most frequent words, of equals the first in the text; at most `vocab` with the
        special ones, which come first."""
        counts = Counter(w for line in lines for w in (line.lower() if lower else line).split())
        found = [w for w, n in counts.most_common() if n >= min_count and w not in special]
        kept = found if vocab is None else found[: max(vocab - len(special), 0)]
        return cls((*special, *kept), lower)

    @property
    def size(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> np.ndarray:
        number, unknown = self._number, self._number[UNKNOWN]
        end = [number[END]] if END in number else []
        text = text.lower() if self.lower else text
        ids: list[int] = []
        for line in lines(text):
            ids += [number.get(word, unknown) for word in line.split()]
            ids += end
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        words = (self.words[i] for i in ids)
        text = " ".join("\n" if word == END else word for word in words if word != PADDING)
        return text.replace(" \n", "\n").replace("\n ", "\n")

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


@dataclasses.dataclass(frozen=True)
class BPE:
    """Byte pairs (Sennrich et al. 2016) over bytes, as in GPT-2: every text has tokens. A token is
    within a line."""

    model: str
    """As the library `tokenizers` writes it."""

    @classmethod
    def of(cls, lines: Iterable[str], vocab: int) -> "BPE":
        made = _library().Tokenizer(_library().models.BPE())
        made.pre_tokenizer = _library().pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = _library().decoders.ByteLevel()
        trainer = _library().trainers.BpeTrainer(
            vocab_size=vocab,
            initial_alphabet=_library().pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(lines, trainer)
        return cls(made.to_str())

    @property
    def size(self) -> int:
        return self._made.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        found = [np.zeros(0, np.int32)]
        every = lines(text)
        for start in range(0, len(every), 10_000):  # an encoding is far larger than its tokens
            encodings = self._made.encode_batch(every[start : start + 10_000])
            found += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return np.concatenate(found)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._made.decode([int(i) for i in ids])

    @functools.cached_property
    def _made(self) -> Any:
        return _library().Tokenizer.from_str(self.model)


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UserError(
            "tokens = bpe needs the package tokenizers: pip install 'ergon[bpe]'"
        ) from None
    return tokenizers


KINDS: dict[str, type] = {"bytes": Bytes, "characters": Characters, "words": Words, "bpe": BPE}


def dumps(tokenizer: Tokenizer) -> str:
    """JSON, one token a line where tokens are listed."""
    kind = next(kind for kind, cls in KINDS.items() if type(tokenizer) is cls)
    fields: Any = tokenizer
    return json.dumps({"kind": kind, **dataclasses.asdict(fields)}, indent=1) + "\n"


def loads(text: str) -> Tokenizer:
    """The inverse of `dumps`. Raises UserError for another text."""
    try:
        fields = json.loads(text)
        cls = KINDS[fields.pop("kind")]
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**given)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is no tokenizer: {error!r}") from None


def lines(text: str) -> list[str]:
    """Lines with their ends; only a line feed ends one."""
    return list(_lines(text))


def _lines(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end
