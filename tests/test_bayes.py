"""Naive Bayes against sums of logarithms by hand, and as the benchmark prints it."""

import math
from collections import Counter

import pytest
import tiny

from research import run
from research.bench import bayes, commands
from research.data.text import LabelledText
from research.models.encoder import EncoderConfig
from research.setup import prepare
from research.train import train

TRAIN = [
    (0, "a bad film"),
    (1, "a Good film"),
    (1, "good , good"),
    (0, "not a good film"),
    (1, "a"),
]
TEST = [(0, "not good"), (1, "good"), (0, "bad unheard"), (1, "film a Good"), (0, "a")]


def features(text, longest):
    words = text.split()
    return [
        tuple(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)
    ]


def by_hand(longest, lower):
    def read(rows):
        return [(c, features(t.lower() if lower else t, longest)) for c, t in rows]

    known = {f for _, found in read(TRAIN) for f in found}

    def score(label, found):
        rows = [f for c, f in read(TRAIN) if c == label]
        counts = Counter(f for row in rows for f in row)
        total = sum(counts.values()) + len(known)
        return math.log(len(rows) / len(TRAIN)) + sum(
            math.log((counts[f] + 1) / total) for f in found if f in known
        )

    hits = [score(c, found) > score(1 - c, found) for c, found in read(TEST)]
    return sum(hits) / len(hits)


@pytest.fixture
def source(tmp_path):
    for name, rows in (("train", TRAIN), ("test", TEST)):
        lines = "".join(f"{label}\t{text}\n" for label, text in rows)
        (tmp_path / f"{name}.tsv").write_text(f"label\ttext\n{lines}")

    def made(**fields):
        train, test = (str(tmp_path / f"{name}.tsv") for name in ("train", "test"))
        return LabelledText(train=train, validation=test, test=test, length=2, **fields)

    return made


@pytest.mark.parametrize("lower", [False, True])
def test_accuracies_are_those_by_hand(source, lower):
    found = bayes.accuracies(source(lower=lower, vocab=3))
    assert list(found) == ["words", "words and pairs"]
    for longest, row in enumerate(found.values(), 1):
        expected = by_hand(longest, lower)
        assert 0.2 < expected < 1
        assert row == pytest.approx({"validation": expected, "test": expected})


def test_bad_rows_count_nowhere(source, tmp_path):
    whole = bayes.accuracies(source())
    for name in ("train", "test"):
        with open(tmp_path / f"{name}.tsv", "a") as file:
            file.write("x\tnot not not\n")
    assert bayes.accuracies(source(on_bad="skip")) == whole


def test_the_benchmark_prints_it_beside_a_run(source, tmp_path, capsys):
    model = EncoderConfig(vocab=9, context=2, classes=2, layers=1, heads=1, width=4)
    e = tiny.mlp(model=model, data=source(), batch_size=4, steps=2)
    train(prepare(e, tiny.ONE), tmp_path / "run", quiet=True)
    config = tmp_path / "run" / "config.json"
    commands.KINDS["bayes"]([str(config), "--runs", str(tmp_path / "run")])
    title, _, head, *rows = capsys.readouterr().out.splitlines()
    assert title == "accuracy in %"
    assert [word for word in head.split() if word.endswith(":")] == ["validation:", "test:"]
    assert [row.split()[-3] for row in rows[:2]] == ["words", "pairs"]
    accuracy = 100 * run.summary(tmp_path / "run").metrics["validation"]["accuracy"]
    assert rows[2].split() == [str(tmp_path / "run"), f"{accuracy:.1f}"]
    with pytest.raises(SystemExit):
        commands.KINDS["bayes"](["configs/mlp_cancer.py"])
    assert "configs/mlp_cancer.py is not on labelled texts" in capsys.readouterr().err
