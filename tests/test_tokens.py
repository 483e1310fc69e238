"""Tokenizers: what they keep of a text, and where their vocabularies come from."""

import builtins
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from research import UserError
from research.data import tokens
from research.data.tokens import BPE, PADDING, UNKNOWN, Bytes, Characters, Words

TEXT = (
    "to be, or not to be:\nthat is\nthe question — être ou ne pas être\n\n"
    "\ttabs  and\r\nmore \u2028🙂\n"
)
LINES = tokens.lines(TEXT)

MADE = {
    "bytes": Bytes(),
    "characters": Characters.of(LINES),
    "characters, unknown": Characters.of(LINES, unknown=True),
    "words": Words.of(LINES),
    "words, lower": Words.of(LINES, (PADDING, UNKNOWN), vocab=9, lower=True),
    "bpe": BPE.of(LINES, 300),
}
every = pytest.mark.parametrize("tokenizer", MADE.values(), ids=MADE)


def texts(characters, n=50):
    rng = random.Random(0)
    return ["".join(rng.choices(characters, k=rng.randrange(40))) for _ in range(n)]


@every
def test_tokens_are_numbers_below_the_size(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert ids.min() >= 0
    assert ids.max() < tokenizer.size
    assert tokenizer.encode("").shape == (0,)


@every
def test_json_keeps_a_tokenizer(tokenizer):
    text = tokens.dumps(tokenizer)
    again = tokens.loads(text)
    assert again == tokenizer
    assert type(again) is type(tokenizer)
    assert tokens.dumps(again) == text
    assert json.loads(text)["kind"] in tokens.KINDS
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


@every
def test_lines_are_encoded_one_after_another(tokenizer):
    each = np.concatenate([tokenizer.encode(line) for line in LINES])
    np.testing.assert_array_equal(tokenizer.encode(TEXT), each)


@pytest.mark.parametrize("name", ["bytes", "characters", "bpe"])
def test_every_text_comes_back(name):
    for text in [TEXT, "", "\n", *texts(TEXT)]:
        assert MADE[name].decode(MADE[name].encode(text)) == text
    other = [chr(c) for c in range(1, 0x3000)]
    for text in texts(other) if name != "characters" else ():
        assert MADE[name].decode(MADE[name].encode(text)) == text


def test_words_come_back_with_one_space_between_them():
    words = Words.of(LINES)
    plain = "".join(" ".join(line.split()) + "\n" for line in LINES)
    assert words.decode(words.encode(TEXT)) == plain
    for text in ("", "\n", "\n\nto or\n", "to\n\n\nor\n"):
        assert words.decode(words.encode(text)) == text


def test_every_line_of_words_has_an_end():
    words = Words.of(["a b\n"])
    assert words.words == ("<unk>", "<eos>", "a", "b")
    for text, ids in {
        "a b\n": [2, 3, 1],
        "a b": [2, 3, 1],
        "\n": [1],
        "b x\na": [3, 0, 1, 2, 1],
        "<unk> <eos>\n": [0, 1, 1],
    }.items():
        assert words.encode(text).tolist() == ids
    padded = Words.of(["a b\n"], (PADDING, UNKNOWN))
    assert padded.encode("b a\n").tolist() == [3, 2]
    assert padded.decode([3, 1, 2, 0, 0]) == "b <unk> a"


def test_a_vocabulary_is_the_most_frequent_words():
    line = "c b a a b c c d <unk> <unk> <unk>"
    assert Words.of([line]).words[2:] == ("c", "b", "a", "d")  # of equals the first in the text
    assert Words.of([line], vocab=4).words[2:] == ("c", "b")
    assert Words.of([line], min_count=2).words[2:] == ("c", "b", "a")
    assert Words.of([line], vocab=4, min_count=3).words[2:] == ("c",)
    assert Words.of([line.upper(), line], lower=True) == Words.of([line], lower=True)
    assert Words.of(["A a"], lower=True).encode("a A").tolist() == [2, 2, 1]


def test_characters_beyond_the_alphabet():
    strict, lenient = (Characters.of(["cab\n"], unknown=u) for u in (False, True))
    assert strict.alphabet == "\nabc"
    assert (strict.size, lenient.size) == (4, 5)
    assert lenient.encode("a?\u00e9z\0").tolist() == [1, 4, 4, 4, 4]
    assert lenient.decode([1, 4]) == "a\ufffd"
    with pytest.raises(UserError, match="no character 'z'"):
        strict.encode("abz\n")
    assert strict.missing("abz\n") == "z"
    assert strict.missing("abc") is None
    assert lenient.missing("abz\n") is None


def test_bytes_that_are_no_text_stay_what_they_are():
    raw = bytes(range(256))
    assert Bytes().encode(raw.decode("utf-8", "surrogateescape")).tolist() == list(raw)
    assert Bytes().decode([0x61, 0xFF]) == "a\ufffd"


def test_byte_pairs_are_merged_and_within_a_line():
    bpe = BPE.of(["the cat the hat\n"] * 9, 270)
    assert 256 < bpe.size <= 270
    assert len(bpe.encode("the cat")) < len("the cat")
    assert BPE.of(["abc"], 256).size == 256
    assert len(BPE.of(["\n\n\n\n"] * 9, 300).encode("\n\n\n")) == 3


def test_byte_pairs_are_the_same_in_every_process():
    program = (
        "from research.data.tokens import *; import random; r = random.Random(0)\n"
        "lines = [' '.join(r.choices(['ab', 'ba', 'abc', 'cab', 'bca'], k=9)) for _ in range(50)]\n"
        "print(dumps(BPE.of(lines, 300)), end='')"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] != ""


def test_without_the_package_a_line_names_the_extra(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **kwargs):
        if name.partition(".")[0] == "tokenizers":
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'ergon\[bpe\]'"):
        BPE.of(["abc"], 256)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "x"}', '{"kind": "words", "a": 1}'])
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(UserError, match="no tokenizer"):
        tokens.loads(text)
