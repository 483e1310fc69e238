"""TFDS data, in real directories that `prepare` makes."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from array_record.python import array_record_module as records
from made import BEASTS, beasts, unprepared
from PIL import Image

from research import UserError
from research.data import prepare, tfds
from research.data.splits import Examples, fingerprint, shuffled, training
from research.data.tfds import TFDS
from research.experiment import Target
from research.models.resnet import ResNetConfig
from research.tasks import Classify
from research.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return beasts(tmp_path_factory.mktemp("beasts"))


def source(folder, **fields):
    return TFDS(**{"name": "beasts", "data_dir": str(folder)} | fields)


def in_order(split):
    """What `folder` holds, in its order."""
    labels = np.arange(len(BEASTS[split])) % 3
    order = np.argsort(labels, kind="stable")
    return BEASTS[split][order], labels[order].astype(np.int32)


def rows_of(split, batch_size=7):
    batches = split.evaluation(batch_size)
    batches = [batches[i] for i in range(len(batches))]
    kept = [batch["weights"] == 1 for batch in batches]
    return tuple(
        np.concatenate([b[key][k] for b, k in zip(batches, kept, strict=True)])
        for key in ("inputs", "targets")
    )


@pytest.mark.parametrize("cache_gb", [4.0, 1e-9])
def test_every_pixel_and_label_is_read(folder, cache_gb):
    data = source(folder, cache_gb=cache_gb).load()
    assert list(data) == ["train", "test"]
    for name, split in data.items():
        assert len(split) == len(BEASTS[name])
        found = rows_of(split)
        for array, expected in zip(found, in_order(name), strict=True):
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == expected.dtype


def test_splits_are_tfds_own(folder):
    data = source(folder, train="train[:75%]", validation="train[75%:]", test=None).load()
    images, _ = in_order("train")
    assert {name: len(split) for name, split in data.items()} == {"train": 30, "validation": 10}
    np.testing.assert_array_equal(rows_of(data["validation"])[0], images[30:])
    joined = source(folder, train="train+test", test=None).load()["train"]
    np.testing.assert_array_equal(rows_of(joined)[1][40:], in_order("test")[1])


def test_batches_are_the_same_decoded_once_or_as_they_are_read(folder):
    kept, read = (source(folder, cache_gb=gb).load()["train"] for gb in (4.0, 1e-9))
    assert type(kept) is Examples
    assert isinstance(kept.rows["inputs"], np.memmap)
    assert type(read) is tfds.Decoded
    for workers in (0, 2):
        steps = zip(training(kept, 16, 3, 2, 7), training(read, 16, 3, 2, 7, workers), strict=True)
        for a, b in steps:
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    whole = read.batch(4, 16, 3)
    parts = [read.batch(4, 16, 3, slice(i, i + 4)) for i in range(0, 16, 4)]
    for key, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), value)


def test_what_was_decoded_is_not_decoded_again(folder, monkeypatch):
    first = source(folder).load()

    def broken(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(tfds, "_image", broken)
    assert fingerprint(source(folder).load()) == fingerprint(first)
    with pytest.raises(AssertionError, match="decoded again"):
        source(folder, size=(6, 8)).load()


@pytest.mark.parametrize("text", ["", "{", None])
def test_what_was_decoded_and_damaged_since_is_said(text, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ERGON_CACHE", str(tmp_path))
    source(folder).load()
    for kept in tmp_path.rglob("bad.json"):
        kept.write_text(text or "")
        if text is None:
            kept.unlink()
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        source(folder).load()


def test_images_of_other_sizes_are_scaled_and_cut_in_the_middle(folder):
    data = source(folder, size=(3, 3)).load()["train"]
    assert data.rows["inputs"].shape == (40, 3, 3, 3)
    image = Image.fromarray(in_order("train")[0][5]).resize((4, 3), Image.Resampling.BILINEAR)
    left = (4 - 3) // 2
    np.testing.assert_array_equal(data.rows["inputs"][5], np.asarray(image)[:, left : left + 3])


def test_tensorflow_is_not_imported(folder, tmp_path):
    program = f"""
import pathlib, sys, tiny
from research.data.tfds import TFDS
from research.models.resnet import ResNetConfig
from research.setup import prepare
from research.train import train
model = ResNetConfig(classes=3, layers=(1,), width=4, stem="cifar")
data = TFDS(name="beasts", data_dir={str(folder)!r})
e = tiny.mlp(model=model, data=data, eval_split="test", steps=2)
train(prepare(e, tiny.ONE), pathlib.Path({str(tmp_path)!r}) / "run", quiet=True)
assert "tensorflow_datasets" in sys.modules
assert not [m for m in sys.modules if m.partition(".")[0] == "tensorflow"]
"""
    paths = {"PYTHONPATH": os.pathsep.join(["tests", str(pathlib.Path.cwd())])}
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | paths)


def rewritten(folder, to, name, change):
    """A copy of the data set in which `change` was applied to one row's bytes, in one file."""
    where = folder / "beasts" / "1.0.0"
    copy = to / "beasts" / "1.0.0"
    copy.mkdir(parents=True)
    for path in where.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    reader = records.ArrayRecordReader(str(copy / name))
    rows = reader.read([*range(reader.num_records())])
    reader.close()
    writer = records.ArrayRecordWriter(str(copy / name), "group_size:1")
    for i, row in enumerate(rows):
        writer.write(change(row) if i == 2 else row)
    writer.close()
    return to


def garbled(row):
    start = row.index(b"PNG")
    return row[:start] + b"GNP" + row[start + 3 :]


@pytest.mark.parametrize("cache_gb", [4.0, 1e-9])
def test_an_image_that_cannot_be_decoded(folder, tmp_path, cache_gb):
    name = sorted(p.name for p in (folder / "beasts" / "1.0.0").glob("beasts-train*"))[1]
    first = folder / "beasts" / "1.0.0" / name.replace("-00001-", "-00000-")
    before = records.ArrayRecordReader(str(first)).num_records()
    bad = rewritten(folder, tmp_path / "bad", name, garbled)
    message = rf"{name}, row 2: the image cannot be decoded"

    def every(on_bad, **fields):
        data = source(bad, on_bad=on_bad, cache_gb=cache_gb, **fields).load()
        return data, list(data["train"].evaluation(20))

    for options in ({"on_bad": "raise"}, {"on_bad": "skip", "max_bad": 0}):
        for _ in range(2):  # kept or not
            with pytest.raises(UserError, match=message):
                every(**options)
    with pytest.raises(UserError, match=message):  # its place in the file, and not in the split
        every("raise", train=f"train[{before + 1}:]")
    for _ in range(2):
        data, batches = every("skip")
        weights, marked, inputs = (
            np.concatenate([b[k] for b in batches]) for k in ("weights", "bad", "inputs")
        )
        images = in_order("train")[0]
        np.testing.assert_array_equal(np.flatnonzero(weights == 0), [before + 2])
        np.testing.assert_array_equal(marked, weights == 0)
        np.testing.assert_array_equal(inputs[weights == 1], images[weights == 1])
        if cache_gb == 4.0:
            (note,) = data.notes
            assert note.startswith("1 bad row skipped, first ")
    shown = data["train"].evaluation(64)[0]
    assert shown["bad"].sum() == 1  # padding is none
    assert shown["weights"].sum() == 39


def test_a_row_that_is_read_again_is_bad_once(folder, tmp_path):
    name = sorted(p.name for p in (folder / "beasts" / "1.0.0").glob("beasts-train*"))[0]
    bad = rewritten(folder, tmp_path / "bad", name, garbled)
    split = source(bad, on_bad="skip", max_bad=1, cache_gb=1e-9).load()["train"]
    epochs = [split.batch(step, 40, 0) for step in range(3)]
    assert [batch["bad"].sum() for batch in epochs] == [1, 1, 1]
    assert len(split.bad.found) == 1


def test_bad_rows_are_of_no_class(folder, tmp_path):
    # The first of test's rows, of class 0, is bad in a set whose training rows lack that class.
    name = next((folder / "beasts" / "1.0.0").glob("beasts-test*-00000-*")).name
    bad = rewritten(folder, tmp_path / "bad", name, garbled)
    fields = {"on_bad": "skip", "train": "train[20:]", "test": "test[2:3]+test[10:]"}
    data = source(bad, **fields).load()
    np.testing.assert_array_equal(np.flatnonzero(data["test"].rows["bad"]), [0])
    assert 0 not in data["train"].rows["targets"]
    model = ResNetConfig(classes=3, layers=(1,), width=4, stem="cifar")
    e = tiny.mlp(model=model, data=source(bad, **fields), batch_size=8, eval_split="test")
    tiny.prepare(e, tiny.ONE)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("options", [{"on_bad": "raise"}, {"on_bad": "skip", "max_bad": 0}])
def test_a_bad_row_that_is_read_while_training_ends_the_run_in_a_line(
    options, workers, folder, tmp_path
):
    name = sorted(p.name for p in (folder / "beasts" / "1.0.0").glob("beasts-train*"))[0]
    bad = rewritten(folder, tmp_path / "bad", name, garbled)
    model = ResNetConfig(classes=3, layers=(1,), width=4, stem="cifar")
    e = tiny.mlp(
        model=model,
        data=source(bad, cache_gb=1e-9, **options),
        batch_size=8,
        eval_split="test",
        steps=9,
        workers=workers,
        # The row is not in the first batch, which is read before the run begins.
        seed=next(seed for seed in range(99) if 2 not in shuffled(0, 8, seed, 40)),
    )
    setup = tiny.prepare(e, tiny.ONE)
    with pytest.raises(UserError, match=rf"{name}, row 2: the image cannot be decoded"):
        train(setup, tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("max_bad", "part"), [(1, slice(0, 8)), (2, slice(0, 8)), (2, slice(4, 8))]
)
def test_bad_rows_of_several_workers_are_counted_together(max_bad, part, folder, tmp_path):
    names = sorted(p.name for p in (folder / "beasts" / "1.0.0").glob("beasts-train*"))[:2]
    bad = folder
    for name in names:
        bad = rewritten(bad, tmp_path / name, name, garbled)
    split = source(bad, cache_gb=1e-9, on_bad="skip", max_bad=max_bad).load()["train"]
    second = next(i for i in range(3, 40) if split.rows.where(i).endswith(f"{names[1]}, row 2"))

    def apart(seed):  # in batches 0 and 1, which two workers make
        of = [next(n for n in range(5) if i in shuffled(n, 8, seed, 40)) for i in (2, second)]
        return sorted(of) == [0, 1]

    seed = next(filter(apart, range(99)))
    read = training(split, 8, seed, 0, 5, workers=2, part=part)
    here = [i for n in range(5) for i in shuffled(n, 8, seed, 40)[part] if i in (2, second)]
    if max_bad == 1:
        with pytest.raises(UserError, match=r"more than max_bad = 1 bad rows; .*cannot be decoded"):
            list(read)
    else:
        assert sum(batch["bad"].sum() for batch in read) == len(here)
        assert split.bad.found.keys() == {split.rows.where(i) for i in here}


def test_skipped_rows_are_counted_in_the_metrics(folder, tmp_path):
    name = sorted(p.name for p in (folder / "beasts" / "1.0.0").glob("beasts-t*"))[0]
    bad = rewritten(folder, tmp_path / "bad", name, garbled)
    model = ResNetConfig(classes=3, layers=(1,), width=4, stem="cifar")
    e = tiny.mlp(
        model=model,
        data=source(bad, on_bad="skip"),
        batch_size=None,
        eval_split="test",
        steps=2,
        target=Target(metric="accuracy", value=0.0, split="train"),
    )
    final = train(tiny.prepare(e, tiny.ONE), tmp_path / "run", quiet=True).metrics
    assert final["test"]["bad"] == pytest.approx(1 / 20)
    assert final["train"]["bad"] == 0
    rows = tiny.rows(tmp_path / "run")
    assert all("bad" in row for row in rows)
    assert "bad row skipped" in (tmp_path / "run" / "log.txt").read_text()


def test_a_label_that_no_class_has(folder, tmp_path):
    name = next((folder / "beasts" / "1.0.0").glob("beasts-test*")).name
    bad = rewritten(folder, tmp_path / "bad", name, lambda row: row)
    copy = bad / "beasts" / "1.0.0"
    (copy / "label.labels.txt").write_text("ape\nbee\n")
    features = json.loads((copy / "features.json").read_text())
    features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "2"
    (copy / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match=r"row \d+: label is 2, and there are 2 classes"):
        source(bad).load()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "birds"}, "has no data set birds; it has: beasts"),
        ({"name": "beasts:2.0.0"}, "beasts:2.0.0"),
        ({"train": "training"}, "beasts/1.0.0: the split training cannot be read: Unknown split"),
        ({"train": "train[:0%]"}, "the split train.:0%. is empty"),
        ({"train": "train[9:3]"}, "the split train.9:3. is empty"),
        ({"inputs": "label", "targets": "label"}, "data.inputs and data.targets are both label"),
        ({"data_dir": __file__}, "data.data_dir: .*test_tfds.py is no folder"),
        ({"inputs": "pixels"}, "data.inputs: no feature pixels; there are image, label"),
        ({"data_dir": "nowhere"}, "no data at nowhere"),
        (
            {"inputs": "label", "size": (3, 3)},
            "data.size is for images, and label is none",
        ),
    ],
)
def test_mistakes_are_said_in_a_line(folder, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        source(folder, **fields).load()
    assert "\n" not in str(caught.value)


def test_a_disk_without_room_is_said_before_it_is_filled(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    with pytest.raises(
        UserError, match=r"train\[:39\] takes 0.0 GB decoded, and the cache has 0.0"
    ):
        source(folder, train="train[:39]").load()


def as_tfrecord(folder, to):
    """A copy of the data set that says it is of TFRecord files."""
    copy = pathlib.Path(shutil.copytree(folder, to)) / "beasts" / "1.0.0"
    info = json.loads((copy / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    for path in copy.glob("*.array_record-*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    return to


def test_files_that_have_no_random_access(folder, tmp_path):
    message = "the split train cannot be read: Random access .*TFRECORD is not supported"
    with pytest.raises(UserError, match=message):
        source(as_tfrecord(folder, tmp_path / "copy")).load()


@pytest.mark.parametrize(
    ("image", "shape", "message"),
    [
        (Image.fromarray(np.full((6, 8), 300, np.uint16)), (6, 8, 1), "mode I;16, are not of 8"),
        (Image.fromarray(np.ones((6, 8), np.float32)), (6, 8, 3), "mode F, are not of 8 bits"),
        (Image.new("L", (8, 6), 7), (6, 8, 3), None),
        (Image.new("CMYK", (8, 6), (0, 0, 0, 248)), (6, 8, 1), None),
    ],
)
def test_images_of_8_bits_in_any_colours(image, shape, message):
    file = io.BytesIO()
    image.save(file, "tiff")
    if message is None:
        np.testing.assert_array_equal(
            tfds._image(file.getvalue(), shape, None), np.full(shape, 7, np.uint8)
        )
    else:
        with pytest.raises(ValueError, match=message):
            tfds._image(file.getvalue(), shape, None)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.int64(1 << 31), np.int32, "x is too large for int32"),
        (np.array([1, -(1 << 33)]), np.int32, "x is too large for int32"),
        (np.array([1e39]), np.float32, "x is too large for float32"),
        (np.array([1.0, np.inf]), np.float32, "x is not finite"),
        (np.array([(1 << 31) - 1, -(1 << 31)]), np.int32, None),
        (np.float64(0.1), np.float32, None),
    ],
)
def test_64_bits_become_32_where_they_fit(value, dtype, message):
    if message is None:
        found = tfds._narrowed("x", value, np.dtype(dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.asarray(value, dtype))
    else:
        with pytest.raises(ValueError, match=message):
            tfds._narrowed("x", value, np.dtype(dtype))


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ergon\[tfds\]'"):
        source(folder).load()


def test_texts_are_for_another_source(tmp_path):
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    prepare.prepare(
        prepare.Options(
            source=tmp_path / "lines.txt", kind="lines", name="poem", out=tmp_path / "tfds"
        )
    )
    with pytest.raises(UserError, match=r"data.inputs: text is a Text.*data.text.Text reads texts"):
        TFDS(name="poem", data_dir=str(tmp_path / "tfds"), inputs="text", targets="text").load()


def test_a_data_set_is_prepared_where_that_takes_no_tensorflow(tmp_path):
    unprepared(tmp_path, "ergon_squares")
    asked = TFDS(name="ergon_squares", data_dir=str(tmp_path), inputs="x", targets="label")
    for _ in range(2):  # and is there the next time
        data = asked.load()
        assert {name: len(split) for name, split in data.items()} == {"train": 48, "test": 48}
        for split in data.values():
            inputs, targets = rows_of(split)
            assert inputs.dtype == np.float32
            np.testing.assert_array_equal(targets, inputs[:, 0])
    with pytest.raises(UserError, match=r"data.inputs: 2 images among .*: name one"):
        dataclasses.replace(asked, inputs=None).load()
    with pytest.raises(UserError, match=r"data.targets: 2 labels among .*: name one"):
        dataclasses.replace(asked, targets=None).load()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("no tensorflow"), r"takes TensorFlow: pip install 'ergon\[prepare\]'"),
        (OSError("no space in /home/me/tensorflow_datasets"), "OSError: no space in /home/me"),
    ],
)
def test_a_data_set_that_cannot_be_prepared(error, message, tmp_path, monkeypatch):
    import tensorflow_datasets

    def failing(*_, **__):
        raise error

    unprepared(tmp_path, "ergon_failing")
    builder = tensorflow_datasets.core.DatasetBuilder
    monkeypatch.setattr(builder, "download_and_prepare", failing)
    with pytest.raises(UserError, match=f"ergon_failing is not prepared in .*; .*{message}"):
        TFDS(name="ergon_failing", data_dir=str(tmp_path), inputs="x", targets="label").load()


@pytest.mark.parametrize("cache_gb", [4.0, 1e-9])
def test_targets_that_are_numbers(tmp_path, cache_gb):
    unprepared(tmp_path, "ergon_numbers")
    asked = TFDS(name="ergon_numbers", data_dir=str(tmp_path), inputs="image", cache_gb=cache_gb)
    two = dataclasses.replace(asked, targets="x").load()["train"]
    assert two.batch(0, 4, 0)["targets"].shape == (4, 2)
    assert two.arrays()["targets"].shape[1:] == (2,)
    whole = dataclasses.replace(asked, targets="y", on_bad="skip").load()["train"].evaluation(48)[0]
    (i,) = np.flatnonzero(whole["bad"])  # y is no number there, and otherwise the row's
    assert whole["targets"].dtype == np.float32
    rest = np.sort(whole["targets"][~whole["bad"]], axis=0)
    np.testing.assert_array_equal(rest[:, 0], [*range(5), *range(6, 48)])
    # Also where it is the first, of which no shape can be learnt.
    late = dataclasses.replace(asked, targets="y", on_bad="skip", train=f"train[{i}:]")
    first = late.load()["train"].evaluation(8)[0]
    np.testing.assert_array_equal(first["bad"], np.arange(8) == 0)
    np.testing.assert_array_equal(first["targets"][1:], whole["targets"][i + 1 : i + 8])


def test_a_run_on_decoded_rows_resumes_bit_for_bit_with_other_workers(folder, tmp_path):
    model = ResNetConfig(classes=3, layers=(1,), width=4, stem="cifar")
    data = source(folder, cache_gb=1e-9)
    e = tiny.mlp(model=model, task=Classify(), data=data, eval_split="test", steps=6, save_every=3)
    whole = tiny.final_state(e, tmp_path / "whole")
    tiny.final_state(dataclasses.replace(e, steps=3), tmp_path / "parts")
    parts = tiny.final_state(dataclasses.replace(e, workers=1), tmp_path / "parts")
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, parts.params))
