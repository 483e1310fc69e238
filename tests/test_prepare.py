"""Own files through scripts/prepare_data.py, read back by TFDS itself."""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys

import numpy as np
import pytest

from research import UserError
from research.data import prepare

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
Image = pytest.importorskip("PIL.Image")

ROOT = pathlib.Path(__file__).parents[1]
RNG = np.random.default_rng(0)


class Stop(Exception):
    pass


def stop_after(rows):
    """Progress that interrupts the writing after some rows."""

    @contextlib.contextmanager
    def progress(what, total):
        done = 0

        def step(n):
            nonlocal done
            done += n
            if what == "writing" and done >= rows:
                raise Stop

        yield step

    return progress


def meanwhile(act):
    """Progress that does something at the first row that is written."""

    @contextlib.contextmanager
    def progress(what, total):
        done = []

        def step(n):
            if what == "writing" and not done:
                act()
            done.append(n)

        yield step

    return progress


def options(source, kind, out, **more):
    return prepare.Options(source=source, kind=kind, out=out, **{"name": "own", **more})


def made(source, kind, out, **more):
    return prepare.prepare(options(source, kind, out, **more))


def read(out, split="train", name="own", **more):
    return list(tfds.data_source(name, data_dir=out, split=split, **more))


def info(out, name="own"):
    return tfds.builder(name, data_dir=out).info


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def save(path, pixels, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def idx(path, array):
    data = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    return write(path, gzip.compress(data) if path.suffix == ".gz" else data)


def digits(root, stem, rows, labels=None, end="", size=(5, 4)):
    images = noise(rows, *size)
    labels = (np.arange(rows) * 7 % 10).astype(np.uint8) if labels is None else labels
    idx(root / f"{stem}-images-idx3-ubyte{end}", images)
    idx(root / f"{stem}-labels-idx1-ubyte{end}", labels)
    return images, labels


def same(rows, images, labels):
    assert len(rows) == len(images) == len(labels)
    for row, image, label in zip(rows, images, labels, strict=True):
        np.testing.assert_array_equal(row["image"], image.reshape(row["image"].shape))
        assert row["label"] == label


def test_images_of_one_size_by_class_and_split(tmp_path):
    pixels = {}
    for split in ("train", "val"):
        for name in ("zwei", "été au lac", "10"):
            for i in range(3):
                pixels[split, name, i] = noise(6, 7, 3)
                save(tmp_path / "in" / split / name / f"{i}.png", pixels[split, name, i])
    write(tmp_path / "in" / "README.txt", "not an image")
    write(tmp_path / "in" / "train" / "10" / ".DS_Store", "not an image")
    found = made(tmp_path / "in", "images", tmp_path / "out")
    assert found.splits == {"train": (9, 1), "validation": (9, 1)}
    features = info(tmp_path / "out").features
    assert features["image"].shape == (6, 7, 3)
    assert features["label"].names == ["10", "zwei", "été au lac"]
    assert info(tmp_path / "out").supervised_keys == ("image", "label")
    for split, ours in (("train", "train"), ("val", "validation")):
        places = [(name, i) for name in features["label"].names for i in range(3)]
        images = [pixels[split, name, i] for name, i in places]
        labels = [features["label"].str2int(name) for name, _ in places]
        same(read(tmp_path / "out", ours), images, labels)


def test_png_and_jpeg_keep_their_bytes_and_others_their_pixels(tmp_path):
    folder = tmp_path / "in" / "all"
    rgb = noise(8, 9, 3)
    kept = [
        save(folder / "a.png", noise(4, 5, 3)),
        save(folder / "b.jpg", noise(16, 17, 3), quality=70),
    ]
    save(folder / "c.webp", rgb, lossless=True)
    save(folder / "d.bmp", rgb)
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(folder / "e.png")
    palette.save(folder / "f.gif")
    made(tmp_path / "in", "images", tmp_path / "out")
    assert info(tmp_path / "out").features["image"].shape == (None, None, 3)
    stored = read(tmp_path / "out", decoders={"image": tfds.decode.SkipDecoding()})
    assert [row["image"] for row in stored[:2]] == [path.read_bytes() for path in kept]
    assert all(row["image"][:4] == b"\x89PNG" for row in stored[2:])
    seen = [Image.open(path) for path in kept]
    images = [np.asarray(image) for image in seen] + [rgb, rgb]
    images += [np.asarray(palette.convert("RGB"))] * 2
    for image in seen:
        image.close()
    same(read(tmp_path / "out"), images, [0] * 6)


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_transparent_images(tmp_path, channels):
    images = [noise(5, 6, channels) for _ in range(3)]
    for i, image in enumerate(images):
        save(tmp_path / "in" / "a" / f"{i}.png", image[..., 0] if channels == 1 else image)
    if channels == 1:  # one bit a pixel, which readers take for 0 and 1 or for 0 and 255
        images.append(np.where(noise(5, 6) > 127, 255, 0).astype(np.uint8))
        Image.fromarray(images[-1]).convert("1").save(tmp_path / "in" / "a" / "3.png")
    else:
        Image.new("LA", (6, 5), (9, 77)).save(tmp_path / "in" / "a" / "3.png")
        images.append(np.tile(np.array([9, 9, 9, 77], np.uint8), (5, 6, 1)))
        # A colour that stands for transparent, which some readers see and others do not.
        hole = np.full((5, 6, 3), 200, np.uint8)
        hole[2, 3] = (1, 2, 3)
        save(tmp_path / "in" / "a" / "4.png", hole, transparency=(1, 2, 3))
        opaque = np.full((5, 6, 1), 255, np.uint8)
        opaque[2, 3] = 0
        images.append(np.concatenate([hole, opaque], axis=2))
    made(tmp_path / "in", "images", tmp_path / "out")
    assert info(tmp_path / "out").features["image"].shape == (5, 6, channels)
    same(read(tmp_path / "out"), images, [0] * len(images))


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx(tmp_path, end):
    train = digits(tmp_path / "in", "train", 30, end=end)
    test = digits(tmp_path / "in", "t10k", 11, end=end)
    made(tmp_path / "in", "idx", tmp_path / "out")
    features = info(tmp_path / "out").features
    assert features["image"].shape == (5, 4, 1)
    assert features["label"].names == list("0123456789")
    same(read(tmp_path / "out"), *train)
    same(read(tmp_path / "out", "test"), *test)


def test_idx_in_colour_without_splits(tmp_path):
    images, labels = noise(6, 3, 4, 3), np.arange(6, dtype=np.uint8)
    idx(tmp_path / "in" / "images.idx4-ubyte", images)
    idx(tmp_path / "in" / "labels.idx1-ubyte", labels)
    made(tmp_path / "in", "idx", tmp_path / "out", split="all_of_it")
    same(read(tmp_path / "out", "all_of_it"), images, labels)


def test_text_by_lines(tmp_path):
    write(tmp_path / "in" / "train.txt", b"\xef\xbb\xbfone\r\n\n  zw\xc3\xb6lf  \nlast")
    write(tmp_path / "in" / "test.txt", "a\tb\n\u2028c\n")
    made(tmp_path / "in", "lines", tmp_path / "out")
    assert [row["text"].decode() for row in read(tmp_path / "out")] == [
        "one",
        "",
        "  zwölf  ",
        "last",
    ]
    assert [row["text"].decode() for row in read(tmp_path / "out", "test")] == ["a\tb", "\u2028c"]


def test_text_by_files(tmp_path):
    for split in ("train", "test"):
        for i in range(3):
            write(tmp_path / "in" / split / f"{i}.md", f"# {split} {i}\r\n\nä\n")
    made(tmp_path / "in", "files", tmp_path / "out")
    for split in ("train", "test"):
        texts = [row["text"].decode() for row in read(tmp_path / "out", split)]
        assert texts == [f"# {split} {i}\r\n\nä\n" for i in range(3)]


COLUMNS = ("whole", "share", "zip", "note", "kind", "huge", "void")
TABLE = [
    ("1", "0.1", "007", 'says "no", twice', "10", "1" * 30, ""),
    ("-5", " nan ", "12", "two\nlines", "9", "2", ""),
    (" 9223372036854775807 ", "-1e-3", "3", "", " 9 ", "3", ""),
    ("+0", "inf", "4", "ü", "100", "4", ""),
]


@pytest.mark.parametrize(("end", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path, end, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([COLUMNS, *TABLE])
    path = write(tmp_path / f"t.{end}", "\ufeff" + text.getvalue() + "\r\n")
    made(path, "table", tmp_path / "out", label="kind")
    features = info(tmp_path / "out").features
    dtypes = {name: np.dtype(features[name].np_dtype).name for name in COLUMNS}
    assert dtypes.pop("whole") == "int64"
    assert dtypes.pop("share") == "float32"
    assert dtypes.pop("kind") == "int64"
    assert set(dtypes.values()) == {"object"}
    assert features["kind"].names == ["9", "10", "100"]
    rows = read(tmp_path / "out")
    assert [row["whole"] for row in rows] == [1, -5, 2**63 - 1, 0]
    shares = np.array([0.1, np.nan, -1e-3, np.inf], np.float32)
    np.testing.assert_array_equal(np.array([row["share"] for row in rows]), shares)
    assert [row["kind"] for row in rows] == [1, 0, 0, 2]
    for name in ("zip", "note", "huge", "void"):
        at = COLUMNS.index(name)
        assert [row[name].decode() for row in rows] == [cells[at] for cells in TABLE]


def test_tables_of_several_files_agree_in_their_types(tmp_path):
    write(tmp_path / "in" / "train.csv", "a,b\n1,x\n2,y\n")
    write(tmp_path / "in" / "test.csv", "a,b\n0.5,z\n")
    made(tmp_path / "in", "table", tmp_path / "out", label="b")
    assert [row["a"] for row in read(tmp_path / "out")] == [1.0, 2.0]
    assert [(row["a"], row["b"]) for row in read(tmp_path / "out", "test")] == [(0.5, 2)]


def lines(path, rows):
    return write(path, "".join(f"row {i}\n" for i in range(rows)))


def texts(out, split="train"):
    return [int(row["text"].split()[1]) for row in read(out, split)]


def test_shares_are_seeded_disjoint_and_in_order(tmp_path):
    path = lines(tmp_path / "in.txt", 100)
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made(path, "lines", tmp_path / name, validation=0.1, test=0.25, split_seed=seed)
        splits = ("train", "validation", "test")
        found[name] = [texts(tmp_path / name, split) for split in splits]
        assert list(map(len, found[name])) == [65, 10, 25]
        assert sorted(row for rows in found[name] for row in rows) == list(range(100))
        assert all(rows == sorted(rows) for rows in found[name])
    assert found["a"] == found["b"] != found["c"]


def test_a_share_of_train_beside_a_test_split(tmp_path):
    train = digits(tmp_path / "in", "train", 20)
    test = digits(tmp_path / "in", "t10k", 5)
    made(tmp_path / "in", "idx", tmp_path / "out", validation=0.2)
    assert len(read(tmp_path / "out")) == 16
    same(read(tmp_path / "out", "test"), *test)
    both = read(tmp_path / "out") + read(tmp_path / "out", "validation")
    seen = sorted((row["label"], row["image"].tobytes()) for row in both)
    assert seen == sorted((int(y), x.tobytes()) for x, y in zip(*train, strict=True))


def test_shuffle_is_seeded_and_within_a_split(tmp_path):
    lines(tmp_path / "in" / "train.txt", 50)
    lines(tmp_path / "in" / "test.txt", 50)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        made(tmp_path / "in", "lines", tmp_path / name, shuffle=seed)
    a, b, c = (texts(tmp_path / name) for name in "abc")
    assert a == b != c
    assert sorted(a) == list(range(50)) != a
    assert texts(tmp_path / "a", "test") != a


def test_shards_are_about_as_large_as_asked(tmp_path):
    path = write(
        tmp_path / "in.txt",
        "".join(random.Random(i).randbytes(50).hex() + "\n" for i in range(1000)),
    )
    found = made(path, "lines", tmp_path / "out", shard_mb=0.01)
    assert found.splits == {"train": (1000, 10)}
    split = info(tmp_path / "out").splits["train"]
    assert split.shard_lengths == [100] * 10
    assert split.num_bytes == pytest.approx(100 * 1000, rel=0.3)
    assert all(path.exists() for path in split.filepaths)
    assert [row["text"].decode() for row in read(tmp_path / "out")] == path.read_text().split()


SCRIPT = [sys.executable, "-W", "error::UserWarning", str(ROOT / "scripts" / "prepare_data.py")]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}


def script(*arguments, **more):
    command = [*SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True)


def test_the_script_in_another_process_gives_the_same_bytes(tmp_path):
    path = write(tmp_path / "in.csv", "b,a,label,c\n" + "1,2,x,y\n0.5,3,z,w\n" * 20)
    flags = ["--kind", "table", "--name", "own", "--label", "label", "--out", tmp_path / "a"]
    result = script(path, *flags, PYTHONHASHSEED="1")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "a" / "own" / "1.0.0"
    assert result.stdout.splitlines() == [
        str(folder),
        "  a: Scalar(shape=(), dtype=int64)",
        "  b: Scalar(shape=(), dtype=float32)",
        "  c: Text(shape=(), dtype=string)",
        "  label: ClassLabel(shape=(), dtype=int64, num_classes=2)",
        "  train: rows 40, files 1",
    ]
    assert result.stderr == "checking: 40 of 40 rows\nwriting: 40 of 40 rows\n"
    here = made(path, "table", tmp_path / "b", label="label").directory
    assert contents(folder) == contents(here)


def test_the_script_says_in_a_line_what_differs(tmp_path):
    folder = made(lines(tmp_path / "in.txt", 3), "lines", tmp_path / "out").directory
    write(folder / "features.json", "{}")
    result = script("--verify", folder)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {folder}: features.json differs\n"


ALONE = """
import sys
from pathlib import Path
from research.data import prepare
source, out = map(Path, sys.argv[1:])
prepare.prepare(prepare.Options(source=source, kind="idx", name="own", out=out))
import tensorflow_datasets as tfds
assert len(list(tfds.data_source("own", data_dir=out, split="train"))) == 7
assert tfds.builder("own", data_dir=out).info.splits["train"].num_examples == 7
prepare.verify(out / "own" / "1.0.0")
assert "tensorflow" not in sys.modules
"""


def test_tensorflow_is_not_imported(tmp_path):
    digits(tmp_path / "in", "train", 7)
    command = [sys.executable, "-c", ALONE, str(tmp_path / "in"), str(tmp_path / "out")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def stamps(folder):
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("own-*")
    }


MANY = {"shard_mb": 0.001, "shuffle": 1, "validation": 0.2}


def test_an_interrupted_call_goes_on_and_gives_the_same_bytes(tmp_path, capsys):
    digits(tmp_path / "in", "train", 500)
    made(tmp_path / "in", "idx", tmp_path / "whole", **MANY)
    work = tmp_path / "out" / "own" / ".1.0.0.incomplete"
    for rows in (130, 200, 430):  # each call stops further on
        with pytest.raises(Stop):
            prepare.prepare(
                options(tmp_path / "in", "idx", tmp_path / "out", **MANY), stop_after(rows)
            )
        with pytest.raises(tfds.core.DatasetNotFoundError):
            tfds.builder("own", data_dir=tmp_path / "out")
    before = stamps(work / "data")
    assert len(before) == 8
    checks = []

    @contextlib.contextmanager
    def seen(what, total):
        checks.append((what, total))
        yield lambda rows: None

    prepare.prepare(options(tmp_path / "in", "idx", tmp_path / "out", **MANY), seen)
    assert checks == [("writing", 500)]  # nor are the rows checked again
    after = stamps(tmp_path / "out" / "own" / "1.0.0")
    assert len(after) == 10
    assert before.items() <= after.items()
    whole = contents(tmp_path / "whole" / "own" / "1.0.0")
    assert contents(tmp_path / "out" / "own" / "1.0.0") == whole
    assert [path.name for path in (tmp_path / "out" / "own").iterdir()] == ["1.0.0"]
    assert "files that an interrupted call has finished: 8\n" in capsys.readouterr().err


KILLED = """
import contextlib, os, signal, sys
from pathlib import Path
from research.data import prepare

@contextlib.contextmanager
def progress(what, total):
    rows = []

    def step(n):
        rows.append(n)
        if what == "writing" and len(rows) == 35:
            os.kill(os.getpid(), signal.SIGKILL)

    yield step

source, out = map(Path, sys.argv[1:])
how = {"name": "own", "shard_mb": 0.0002}
prepare.prepare(prepare.Options(source=source, kind="idx", out=out, **how), progress)
"""


def test_a_killed_process_goes_on(tmp_path):
    digits(tmp_path / "in", "train", 100)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(tmp_path / "out")]
    result = subprocess.run(command, env=environment())
    assert result.returncode == -signal.SIGKILL
    before = stamps(tmp_path / "out" / "own" / ".1.0.0.incomplete" / "data")
    assert len(before) == 3
    found = made(tmp_path / "in", "idx", tmp_path / "out", shard_mb=0.0002)
    assert found.splits == {"train": (100, 10)}
    assert before.items() <= stamps(found.directory).items()
    again = made(tmp_path / "in", "idx", tmp_path / "again", shard_mb=0.0002)
    assert contents(found.directory) == contents(again.directory)


@pytest.mark.parametrize("what", ["bytes", "time", "more", "fewer", "option"])
def test_a_changed_input_starts_over(tmp_path, capsys, what):
    for i in range(6):
        write(tmp_path / "in" / f"{i}.txt", f"text {i} " * 50)
    how = {"shard_mb": 0.0005}
    with pytest.raises(Stop):
        prepare.prepare(options(tmp_path / "in", "files", tmp_path / "out", **how), stop_after(4))
    before = stamps(tmp_path / "out" / "own" / ".1.0.0.incomplete" / "data")
    assert len(before) == 2
    if what == "bytes":
        write(tmp_path / "in" / "0.txt", "other " * 50)
    elif what == "time":  # other text of the same length
        write(tmp_path / "in" / "0.txt", f"tuxt {0} " * 50)
        os.utime(tmp_path / "in" / "0.txt", (1, 1))
    elif what == "more":
        write(tmp_path / "in" / "00.txt", "another")
    elif what == "fewer":
        (tmp_path / "in" / "5.txt").unlink()
    else:
        how["shuffle"] = 0
    found = made(tmp_path / "in", "files", tmp_path / "out", **how)
    again = made(tmp_path / "in", "files", tmp_path / "again", **how)
    assert contents(found.directory) == contents(again.directory)
    times = {time for _, time in before.values()}
    assert not times & {time for _, time in stamps(found.directory).values()}
    assert "have changed since an interrupted call: all anew\n" in capsys.readouterr().err


def test_a_damaged_file_of_an_interrupted_call_is_written_again(tmp_path):
    path = lines(tmp_path / "in.txt", 100)
    with pytest.raises(Stop):
        prepare.prepare(options(path, "lines", tmp_path / "out", shard_mb=0.0002), stop_after(70))
    data = tmp_path / "out" / "own" / ".1.0.0.incomplete" / "data"
    first = data / min(stamps(data))
    damaged = bytearray(first.read_bytes())
    damaged[200] ^= 1
    first.write_bytes(damaged)
    found = made(path, "lines", tmp_path / "out", shard_mb=0.0002)
    again = made(path, "lines", tmp_path / "again", shard_mb=0.0002)
    assert contents(found.directory) == contents(again.directory)


def test_input_that_changes_while_it_is_read(tmp_path):
    path = lines(tmp_path / "in.txt", 100)
    act = meanwhile(lambda: lines(path, 101))
    with pytest.raises(UserError, match=r"in\.txt was changed while it was read"):
        prepare.prepare(options(path, "lines", tmp_path / "out"), act)
    assert not (tmp_path / "out" / "own" / "1.0.0").exists()
    made(path, "lines", tmp_path / "out")
    assert texts(tmp_path / "out") == list(range(101))


def test_a_version_that_another_process_finished_meanwhile_stays(tmp_path):
    path = lines(tmp_path / "in.txt", 10)
    other = tmp_path / "out" / "own" / "1.0.0" / "theirs"
    with pytest.raises(UserError, match="is there already"):
        prepare.prepare(
            options(path, "lines", tmp_path / "out"), meanwhile(lambda: write(other, ""))
        )
    assert other.exists()


def test_two_processes_do_not_write_one_data_set(tmp_path):
    path = lines(tmp_path / "in.txt", 10)
    work = tmp_path / "out" / "own" / ".1.0.0.incomplete"
    work.mkdir(parents=True)
    held = os.open(work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"another process is at work in .*incomplete"):
        made(path, "lines", tmp_path / "out")
    os.close(held)
    made(path, "lines", tmp_path / "out")


def test_a_finished_version_stays_unless_overwrite(tmp_path):
    path = lines(tmp_path / "in.txt", 10)
    made(path, "lines", tmp_path / "out")
    lines(path, 20)
    with pytest.raises(UserError, match=r"own/1\.0\.0 is there already: .*--overwrite"):
        made(path, "lines", tmp_path / "out")
    assert len(texts(tmp_path / "out")) == 10
    with pytest.raises(Stop):
        prepare.prepare(options(path, "lines", tmp_path / "out", overwrite=True), stop_after(15))
    assert len(texts(tmp_path / "out")) == 10
    made(path, "lines", tmp_path / "out", overwrite=True)
    assert len(texts(tmp_path / "out")) == 20
    made(path, "lines", tmp_path / "out", version="1.1.0", validation=0.5)
    assert len(texts(tmp_path / "out")) == 10  # TFDS takes the newest
    names = sorted(path.name for path in (tmp_path / "out" / "own").iterdir())
    assert names == ["1.0.0", "1.1.0"]


def test_a_version_is_not_lost_between_two_renamings(tmp_path, monkeypatch):
    path = lines(tmp_path / "in.txt", 10)
    folder = made(path, "lines", tmp_path / "out").directory
    lines(path, 20)
    rename = os.rename

    def killed(source, target):
        if target == folder:
            raise Stop
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        with pytest.raises(Stop):
            made(path, "lines", tmp_path / "out", overwrite=True)
    assert not folder.exists()
    with pytest.raises(UserError, match="is there already"):
        made(path, "lines", tmp_path / "out")
    assert len(texts(tmp_path / "out")) == 10
    made(path, "lines", tmp_path / "out", overwrite=True)
    assert len(texts(tmp_path / "out")) == 20


def test_all_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    synced, fsync, rename = [], os.fsync, os.rename

    def noted(descriptor):
        synced.append(os.stat(descriptor).st_ino)
        fsync(descriptor)

    def moved(source, target):
        inside = [source, *pathlib.Path(source).iterdir()]
        assert {os.stat(path).st_ino for path in inside} <= set(synced)
        rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", moved)
    folder = made(lines(tmp_path / "in.txt", 10), "lines", tmp_path / "out").directory
    assert synced == [os.stat(path).st_ino for path in (folder.parent, tmp_path / "out")]


def test_a_folder_that_cannot_be_synced_is_no_obstacle(tmp_path, monkeypatch):
    fsync = os.fsync

    def refusing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    made(lines(tmp_path / "in.txt", 10), "lines", tmp_path / "out")
    assert len(texts(tmp_path / "out")) == 10


def test_checksums_are_those_of_the_files_and_verify_names_what_differs(tmp_path):
    digits(tmp_path / "in", "train", 20)
    folder = made(tmp_path / "in", "idx", tmp_path / "out", shard_mb=0.0002).directory
    files = contents(folder)
    sums = json.loads(files.pop("checksums.json"))["sha256"]
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert {"dataset_info.json", "features.json", "label.labels.txt"} < set(sums)
    assert prepare.verify(folder) == len(sums) == 5
    for name, data in files.items():
        broken = bytearray(data)
        broken[len(data) // 2] ^= 1
        (folder / name).write_bytes(broken)
        with pytest.raises(UserError, match=f"own/1.0.0: {name} differs$"):
            prepare.verify(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"own/1.0.0: {name} is missing$"):
            prepare.verify(folder)
        (folder / name).write_bytes(data)
    write(folder / "more", "")
    with pytest.raises(UserError, match=r"own/1\.0\.0: more is not of it$"):
        prepare.verify(folder)
    with pytest.raises(UserError, match=r"out has no checksums\.json"):
        prepare.verify(tmp_path / "out")
    write(folder / "checksums.json", "[]")
    with pytest.raises(UserError, match=r"checksums\.json is damaged"):
        prepare.verify(folder)


def good_images(root):
    for name in ("a", "b"):
        for i in range(3):
            save(root / name / f"{i}.png", noise(4, 4, 3))


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def frames(path):
    images = [Image.fromarray(noise(4, 4, 3)) for _ in range(2)]
    images[0].save(path, save_all=True, append_images=images[1:])


def idx_files(root, rows=4, labels=4):
    digits(root, "train", rows, np.zeros(labels, np.uint8))
    return root / "train-images-idx3-ubyte"


def longer(path, data=b"\0"):
    path.write_bytes(path.read_bytes() + data)


# What is made in a folder, besides good images for "images"; and the message.
BAD_ROWS = [
    ("images", lambda r: write(r / "b/1.png", b""), "in/b/1.png is no image that Pillow can read"),
    ("images", lambda r: cut(r / "b/1.png"), "in/b/1.png cannot be decoded: .*truncated"),
    ("images", lambda r: write(r / "b/x.txt", "text"), "in/b/x.txt is no image"),
    ("images", lambda r: frames(r / "a/x.gif"), "in/a/x.gif has 2 frames"),
    (
        "images",
        lambda r: save(r / "a/x.png", noise(4, 4)),
        "in/a/x.png has 1 channels, and 6 of 7 im",
    ),
    (
        "images",
        lambda r: save(r / "a/x.png", noise(4, 4, 4)),
        "in/a/x.png has 4 channels, and 6 of 7",
    ),
    (
        "images",
        lambda r: save(r / "a/x.png", noise(4, 4).astype(np.uint16)),
        "in/a/x.png has 16 bits a channel",
    ),
    (
        "images",
        lambda r: Image.new("CMYK", (4, 4)).save(r / "a/x.jpg"),
        "in/a/x.jpg has pixels of mode CMYK",
    ),
    (
        "lines",
        lambda r: write(r / "t.txt", b"ok\nab\xff\nok\n"),
        "t.txt line 2 is not UTF-8 at its byte 2",
    ),
    ("files", lambda r: [write(r / f"{i}", b"\xff" * i) for i in (0, 1)], "in/1 is not UTF-8"),
    (
        "table",
        lambda r: write(r / "t.csv", "x,y\n1,2\n\n3\n"),
        "t.csv line 4 has 1 cells, and the h.* 2",
    ),
    ("table", lambda r: write(r / "t.csv", 'x,y\n"a\nb",2\n3,4,5\n'), "t.csv line 4 has 3 cells"),
    (
        "table",
        lambda r: write(r / "t.csv", "x,y\n1,2\n,3\n"),
        "t.csv line 3 has nothing in column x",
    ),
    (
        "table",
        lambda r: write(r / "t.csv", "x,y\n1,.2\n1,4e39\n"),
        "line 3 has 4e39 in column y: too",
    ),
    (
        "table",
        lambda r: write(r / "t.csv", b"x,y\n1,a\n1,\xe4\n"),
        "t.csv line 3 is not UTF-8 at its b",
    ),
    (
        "table",
        lambda r: write(r / "t.csv", 'x,y\n1,a\n1,"a"b\n'),
        "line 3 is no row of a table: .*exp",
    ),
    (
        "table --label y",
        lambda r: write(r / "t.csv", "x,y\n1,a\n1, \n"),
        "t.csv line 3 has no label",
    ),
    (
        "table --label y",
        lambda r: write(r / "t.csv", 'x,y\n1,a\n1,"b\nc"\n'),
        "line 3 has the label 'b",
    ),
]


def bad(kind, make, tmp_path):
    kind, _, label = kind.partition(" --label ")
    root = tmp_path / "in"
    root.mkdir()
    if kind == "images":
        good_images(root)
    make(root)
    return options(root, kind, tmp_path / "out", label=label or None)


@pytest.mark.parametrize(("kind", "make", "message"), BAD_ROWS)
def test_bad_rows_stop_before_anything_is_created(tmp_path, kind, make, message):
    wanted = bad(kind, make, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare.prepare(wanted)
    assert "\n" not in str(caught.value)
    assert not wanted.out.exists()


@pytest.mark.parametrize(("kind", "make", "message"), BAD_ROWS)
def test_bad_rows_are_left_out_and_listed(tmp_path, kind, make, message):
    wanted = bad(kind, make, tmp_path)
    with pytest.raises(UserError) as caught:
        prepare.prepare(wanted)
    found = prepare.prepare(dataclasses.replace(wanted, on_bad="skip"))
    assert found.bad == 1
    assert "listed in bad_rows.txt: 1" in str(found)
    line = (found.directory / "bad_rows.txt").read_text()
    assert f"{wanted.source}/{line}" == f"{caught.value}\n"
    rows = read(wanted.out)
    assert len(rows) == found.splits["train"][0] >= 1
    if kind == "images":
        assert all(row["image"].shape == (4, 4, 3) for row in rows)
    prepare.verify(found.directory)
    with pytest.raises(UserError, match=r"more than --max_bad 0 rows are bad, now .*/in/"):
        prepare.prepare(dataclasses.replace(wanted, on_bad="skip", max_bad=0, version="1.0.1"))


def test_what_is_left_out_is_nowhere_else_missed(tmp_path):
    text = [f"row {i}\n".encode() if i % 4 else b"\xff\n" for i in range(40)]
    write(tmp_path / "in.txt", b"".join(text))
    found = made(tmp_path / "in.txt", "lines", tmp_path / "out", on_bad="skip", test=0.5)
    assert found.bad == 10
    both = texts(tmp_path / "out") + texts(tmp_path / "out", "test")
    assert sorted(both) == [i for i in range(40) if i % 4]


# Not one row, so that nothing can be left out.
BAD_FILES = [
    ("images", lambda r: (r / "c").mkdir(), "in/c is a class without images"),
    ("images", lambda r: (r / "a/more").mkdir(), "in/a/more is a folder, and a class holds images"),
    ("images", lambda r: save(r / "x.png", noise(2, 2)), "in/x.png is in no class folder"),
    ("images", lambda r: (r / "train").mkdir(), "in has train, a split, beside a, which is none"),
    ("images", lambda r: save(r / " c/0.png", noise(4, 4, 3)), "in has a class folder ' c'"),
    ("images", lambda r: [shutil.rmtree(r / n) for n in "ab"], "in has no class folders"),
    (
        "idx",
        lambda r: longer(idx_files(r)),
        "images-idx3-ubyte has 97 bytes, and its header asks for 96",
    ),
    (
        "idx",
        lambda r: cut(idx_files(r)),
        "images-idx3-ubyte has 66 bytes, and its header asks for 96",
    ),
    ("idx", lambda r: idx_files(r).write_bytes(b"\0\0\x08\x03\0"), "has 5 bytes"),
    (
        "idx",
        lambda r: idx_files(r).write_bytes(b"\0\0\x0d\x03" * 9),
        "does not begin as an IDX file",
    ),
    ("idx", lambda r: idx_files(r, 4, 5), "images-idx3-ubyte has 4 images, and .* 5 labels"),
    ("idx", lambda r: idx_files(r).unlink(), "labels-idx1-ubyte has no file of images beside it"),
    ("idx", lambda r: (idx_files(r), digits(r, "t10k", 0)), "the split test has no rows"),
    ("idx", lambda r: write(r / "x.bin", b""), "in has no files such as train-images-idx3-ubyte"),
    ("idx", lambda r: (idx_files(r), digits(r, "x", 1)), "in has train, a split, beside x"),
    ("lines", lambda r: write(r / "train.txt", ""), "in: the split train has no rows"),
    (
        "lines",
        lambda r: [lines(r / n, 2) for n in ("train.txt", "x.txt")],
        "in has train, a split, be",
    ),
    (
        "lines",
        lambda r: [lines(r / n, 2) for n in ("val.txt", "dev.txt")],
        "in has one split twice: ",
    ),
    ("files", lambda r: (r / "train").mkdir(), "in: the split train has no rows"),
    ("files", lambda r: lines(r / "a" / "b", 2), "in/a is a folder, and its name that of no split"),
    ("files", lambda r: [lines(r / n, 2) for n in ("a", "b/c")], "in/a lies beside a folder, b"),
    ("table", lambda r: write(r / "t.csv", ""), "t.csv has no header"),
    ("table", lambda r: write(r / "t.csv", "a,b\n"), "the split train has no rows"),
    (
        "table",
        lambda r: write(r / "t.csv", "a,a\n1,2\n"),
        "t.csv has a column 'a': names are unique",
    ),
    ("table", lambda r: write(r / "t.csv", "a,\n1,2\n"), "t.csv has a column '': names are unique"),
    (
        "table",
        lambda r: write(r / "t.csv", 'a,b\n1,2\n3,"4\n5,6\n'),
        "line 3: a quote is opened and",
    ),
    ("table", lambda r: write(r / "t.xls", "a,b\n1,2\n"), "t.xls is neither .csv nor .tsv"),
    (
        "table --label c",
        lambda r: write(r / "t.csv", "a,b\n1,2\n"),
        "t.csv has no column c, which --label names; it has a, b",
    ),
    (
        "table",
        lambda r: [write(r / n, f"a,{n[1]}\n1,2\n") for n in ("xb.csv", "xc.csv")],
        "xc.csv has another header than .*xb.csv: a, c",
    ),
]


@pytest.mark.parametrize(("kind", "make", "message"), BAD_FILES)
@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_bad_files_stop_before_anything_is_created(tmp_path, kind, make, message, on_bad):
    wanted = bad(kind, make, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        prepare.prepare(dataclasses.replace(wanted, on_bad=on_bad))
    assert "\n" not in str(caught.value)
    assert not wanted.out.exists()


MISTAKES = [
    ({"source": None}, "give a file or folder, --kind and --name"),
    ({"kind": None}, "give a file or folder, --kind and --name"),
    ({"name": None}, "give a file or folder, --kind and --name"),
    ({"source": pathlib.Path("absent")}, "there is no absent"),
    ({"kind": "images"}, r"in\.txt is not a folder, as --kind images reads"),
    ({"name": "My-Data"}, "--name 'My-Data' must be of a-z"),
    ({"name": "mnist"}, "--name mnist is a data set that TFDS has"),
    ({"version": "1"}, "--version '1' must be three numbers"),
    ({"split": "all"}, "--split 'all' must be of letters"),
    ({"split": "a b"}, "--split 'a b' must be of letters"),
    ({"validation": 1.5}, "--validation 1.5 must be 0 or more"),
    ({"test": -0.1}, "--test -0.1 must be 0 or more"),
    ({"test": 0.5, "validation": 0.5}, "leave nothing of the rows"),
    ({"test": 0.01}, "the split test has no rows"),
    ({"test": 0.96}, "the split train has no rows"),
    ({"test": 0.5, "split": "test"}, "in.txt has a split test already"),
    ({"shuffle": -1}, "--shuffle and --max_bad must be 0 or more"),
    ({"shard_mb": 0.0}, "--shard_mb 0.0 must be more than 0"),
    ({"label": "x"}, "--label is a column of a table, and --kind is lines"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_stop_before_anything_is_read_or_created(tmp_path, change, message):
    path = lines(tmp_path / "in.txt", 10)
    wanted = dataclasses.replace(options(path, "lines", tmp_path / "out"), **change)

    def progress(what, total):
        raise AssertionError("the rows are being checked")

    with pytest.raises(UserError, match=message):
        prepare.prepare(wanted, progress)
    assert not wanted.out.exists()


def test_splits_of_the_input_stay_as_they_are(tmp_path):
    for name in ("test", "val"):
        lines(tmp_path / "in" / f"{name}.txt", 4)
    for change, message in (
        ({"split": "train"}, "--split train: .*in has splits of its own"),
        ({"test": 0.5}, "--test is taken from train, and there is none"),
    ):
        with pytest.raises(UserError, match=message):
            made(tmp_path / "in", "lines", tmp_path / "out", **change)
    lines(tmp_path / "in" / "train.txt", 4)
    with pytest.raises(UserError, match=r"--test 0\.5: .*in has a split test already"):
        made(tmp_path / "in", "lines", tmp_path / "out", test=0.5)
    with pytest.raises(UserError, match="would be inside of what is read"):
        made(tmp_path / "in", "lines", tmp_path / "in" / "out")
    assert not (tmp_path / "out").exists()
