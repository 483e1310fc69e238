"""Data in outline: the step that is traced without the data is the one that is traced with it."""

import dataclasses
import pathlib

import made
import numpy as np
import pytest
import tiny

from research import UserError
from research.data.outline import Outline, outlined
from research.data.table import Table
from research.data.text import LabelledText, Text
from research.data.tfds import TFDS
from research.models.encoder import EncoderConfig
from research.models.resnet import ResNetConfig
from research.setup import prepare

LINES = "to be or not to be\nthat is the question\nwhether tis\n" * 20
ROWS = "label\ttext\n" + "".join(f"{i % 3}\t{line}\n" for i, line in enumerate(LINES.split("\n")))


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """Files, found by their names: a text, its rows in three classes, and images of 6 x 8."""
    root = tmp_path_factory.mktemp("data")
    (root / "train.txt").write_text(LINES)
    (root / "train.tsv").write_text(ROWS.rstrip("\n\t0123456789") + "\n")
    made.beasts(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERGON_DATA", str(root))
        patch.setenv("ERGON_CACHE", str(root / "cache"))
        yield root


def words(**fields):
    return Text(train="train.txt", tokens="words", length=8, **fields)


ENCODER = EncoderConfig(classes=3, vocab=40, context=5, layers=1, heads=2, width=8)
IMAGES = TFDS(name="beasts", data_dir="tfds", size=(4, 6))
RESNET = ResNetConfig(classes=3, layers=(1,), width=4, stem="cifar")


def on(family, data, **fields):
    e = family(data=data, **fields)
    vocab = {name: 40 for name in ("vocab", "outputs") if hasattr(e.model, name)}
    return dataclasses.replace(e, model=dataclasses.replace(e.model, **vocab))


EVERY = {
    "windows": lambda **f: on(tiny.transformer, words(**f)),
    "streams": lambda **f: on(tiny.lstm, words(rows="streams", **f)),
    "packed": lambda **f: on(tiny.packed, words(rows="packed", **f)),
    "labelled text": lambda **f: on(
        tiny.mlp, LabelledText(train="train.tsv", length=5, **f), model=ENCODER
    ),
    "images": lambda **f: on(
        tiny.resnet, dataclasses.replace(IMAGES, **f), model=RESNET, eval_split="test"
    ),
}


def step(e):
    """The step, as StableHLO."""
    setup = prepare(e, tiny.ONE)
    return setup.step().lower(*setup.abstract_example()).as_text()


@pytest.mark.parametrize("name", EVERY)
def test_a_step_is_that_of_the_data(name):
    e = EVERY[name]()
    assert step(outlined(e)) == step(e)


@pytest.mark.parametrize("name", ["windows", "labelled text", "images"])
def test_bad_rows_are_in_the_batch_where_they_are_skipped(name):
    e = EVERY[name](on_bad="skip")
    found = step(outlined(e))
    assert found == step(e)
    assert found != step(outlined(EVERY[name]()))


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_read_and_nothing_held(name, monkeypatch):
    e = EVERY[name]()
    real = e.data.load()
    monkeypatch.delenv("ERGON_DATA")
    found = e.data.outline(10**4)
    assert found.keys() == real.keys()
    for split in found:
        assert type(found[split]) is type(real[split])
        found[split].check(10**4)
        for key, array in found[split].arrays().items():
            if name != "packed" or key == "tokens":
                assert not any(array.strides), key
        batches = (each[split].batch(0, 2, 0) for each in (found, real))
        like = [{k: (v.dtype, v.shape) for k, v in batch.items()} for batch in batches]
        assert like[0] == like[1]


def test_splits_are_those_that_were_asked_for():
    text = words(validation="train.txt", test="train.txt")
    assert text.outline(4).keys() == text.load().keys() == {"train", "validation", "test"}
    images = dataclasses.replace(IMAGES, validation="test[:9]", test=None)
    assert images.outline(4).keys() == images.load().keys() == {"train", "validation"}


def test_a_batch_is_as_large_as_it_is_asked_for():
    for name, make in EVERY.items():
        e = dataclasses.replace(make(), batch_size=96)
        assert len(prepare(outlined(e), tiny.ONE).first["inputs"]) == 96, name
    assert outlined(dataclasses.replace(tiny.mlp(), batch_size=None)).data == tiny.Points()


def test_what_only_the_data_tells_is_read(folder):
    points = Outline(data=tiny.Points(), rows=4).load()
    np.testing.assert_equal(points["train"].rows, tiny.Points().load()["train"].rows)
    for told_by_data in (
        dataclasses.replace(IMAGES, size=None),
        dataclasses.replace(IMAGES, targets="label"),
    ):
        assert told_by_data.outline(4) is None
        images = Outline(data=told_by_data, rows=4).load()["train"]
        assert len(images) == len(made.BEASTS["train"])
    with pytest.raises(UserError, match=r"no data at nowhere\.csv"):
        Outline(data=Table(path="nowhere.csv", target="label"), rows=4).load()
    assert pathlib.Path(folder, "tfds").is_dir()
