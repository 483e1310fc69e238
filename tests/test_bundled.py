"""Bundled data against scikit-learn's and the standard library's own copies."""

from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

from research.data.bundled import BreastCancer, Digits, PythonReference
from research.data.splits import Examples, Streams, Windows, fingerprint

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def identities(images, labels):
    return Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize(
    ("source", "labels"), [(Digits, load_digits), (BreastCancer, load_breast_cancer)]
)
def test_splits_are_stratified_shares(source, labels):
    labels = labels().target
    data = source().load()
    assert list(data) == list(SHARES)
    for name, share in SHARES.items():
        split = data[name]
        assert type(split) is Examples
        assert split.rows.keys() == {"inputs", "targets"}
        assert abs(len(split) - share * len(labels)) < 2
        targets = split.rows["targets"]
        assert targets.dtype == np.int32
        assert split.rows["inputs"].dtype == np.float32
        expected = share * np.bincount(labels)
        np.testing.assert_allclose(np.bincount(targets), expected, atol=2)


@pytest.mark.parametrize("source", [Digits, BreastCancer])
def test_split_seed_decides_the_splits(source):
    first, again, default, other = (
        source(**k).load() for k in ({"split": 0},) * 2 + ({}, {"split": 1})
    )
    for name in SHARES:
        mark, *same, changed = (
            fingerprint({name: d[name]}) for d in (first, again, default, other)
        )
        assert same == [mark, mark]
        assert changed != mark


def test_some_digits_and_some_of_their_training_images():
    images, digits = load_digits().images, load_digits().target
    whole = Digits(classes=(7, 2)).load()
    found = Counter()
    for split in whole.values():
        pixels = np.round(split.rows["inputs"][..., 0] * 16).astype(images.dtype)
        found += identities(pixels, np.array([7, 2])[split.rows["targets"]])
    there = np.isin(digits, (7, 2))
    assert found == identities(images[there], digits[there])
    few = Digits(classes=(7, 2), train=5).load()
    for key in ("inputs", "targets"):
        np.testing.assert_array_equal(few["train"].rows[key], whole["train"].rows[key][:5])
        np.testing.assert_array_equal(few["test"].rows[key], whole["test"].rows[key])


@pytest.mark.parametrize("classes", [(), (3,), (3, 3, 4), (3, 10)])
def test_classes_that_are_none(classes):
    with pytest.raises(ValueError, match="classes"):
        Digits(classes=classes)


@pytest.mark.parametrize("split", [0, 7])
def test_digits_are_each_in_one_split(split):
    digits = load_digits()
    data = Digits(split=split).load()
    found = Counter()
    for part in data.values():
        assert part.rows["inputs"].shape[1:] == (8, 8, 1)
        sixteenths = (16 * part.rows["inputs"][..., 0]).astype(np.float64)
        found += identities(sixteenths, part.rows["targets"])
    assert found == identities(digits.images, digits.target)
    assert max(found.values()) == 1


@pytest.mark.parametrize("upscale", [2, 4])
def test_upscaled_pixels_are_squares(upscale):
    plain, large = Digits().load()["test"].rows, Digits(upscale=upscale).load()["test"].rows
    square = np.ones((1, upscale, upscale, 1), np.float32)
    np.testing.assert_array_equal(large["inputs"], np.kron(plain["inputs"], square))
    np.testing.assert_array_equal(large["targets"], plain["targets"])
    assert large["inputs"].dtype == np.float32


def test_cancer_is_standardised_by_its_training_rows():
    table = load_breast_cancer()
    data = {name: split.rows for name, split in BreastCancer().load().items()}
    train = data["train"]["inputs"].astype(np.float64)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
    for name in ("validation", "test"):
        held_out = data[name]["inputs"]
        assert np.abs(held_out.mean(0)).max() > 0.05
        assert np.abs(held_out.std(0) - 1).max() > 0.05

    # One affine map a column takes all rows back to the table: which rows they are then shows.
    inputs = np.concatenate([data[name]["inputs"] for name in data]).astype(np.float64)
    scale = table.data.std(0) / inputs.std(0)
    raw = (inputs - inputs.mean(0)) * scale + table.data.mean(0)
    distance = np.abs((raw[:, None] - table.data) / table.data.std(0)).max(-1)
    row = distance.argmin(1)
    assert distance.min(1).max() < 1e-5
    assert sorted(row) == list(range(len(table.data)))
    targets = np.concatenate([data[name]["targets"] for name in data])
    np.testing.assert_array_equal(targets, table.target[row])


@pytest.mark.parametrize(("stream", "kind"), [(False, Windows), (True, Streams)])
def test_the_python_reference_decodes_to_its_text(stream, kind):
    data = PythonReference(length=64, stream=stream).load()
    assert list(data) == ["train", "validation"]
    assert {type(split) for split in data.values()} == {kind}
    assert {split.length for split in data.values()} == {64}
    alphabet = PythonReference.alphabet()
    tokens = {name: split.tokens for name, split in data.items()}
    train, validation = ("".join(map(alphabet.__getitem__, t)) for t in tokens.values())
    text = train + validation

    assert len(text) == sum(map(len, topics.values()))
    assert Counter(text) == sum(map(Counter, topics.values()), Counter())
    assert all(topic in text for topic in topics.values())
    assert list(alphabet) == sorted(set(text))
    assert len(train) == len(text) * 9 // 10
    assert {t.dtype for t in tokens.values()} == {np.dtype(np.int32)}
    assert max(t.max() for t in tokens.values()) == len(alphabet) - 1


def test_the_python_reference_is_the_same_each_time():
    first, again = (PythonReference(length=n).load() for n in (8, 8))
    assert fingerprint(first) == fingerprint(again)
    batch = first["train"].batch(0, 3, seed=0)
    assert batch["inputs"].shape == batch["targets"].shape == (3, 8)
    text = "".join(PythonReference.alphabet()[t] for t in batch["inputs"][0])
    assert text in "".join(topics[name] for name in sorted(topics))
