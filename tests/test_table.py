"""Tables: what training rows decide, what is bad and where, and what a run keeps."""

import csv
import dataclasses
import json
import os
import pathlib
import sys

import made
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny

from research import UserError, run
from research.data import prepare as preparing
from research.data.splits import fingerprint
from research.data.table import Table
from research.data.transform import MISSING, OTHER, Category, Number, Transform
from research.models.mlp import MLPConfig
from research.setup import prepare
from research.train import train

HEADER = ["id", "age", "town", "member", "name", "label"]
TOWNS = ("Bern", "Oslo, Norway", 'the "Hague"', "two\nlines")


def cells(n=60, seed=0):
    """Rows of text whose ages, towns and members are sometimes missing, and labels never."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        age = "" if rng.random() < 0.15 else repr(round(float(rng.normal(40, 10)), 3))
        town = "" if rng.random() < 0.1 else TOWNS[rng.integers(4)]
        member = "" if rng.random() < 0.1 else ("true", "false")[rng.integers(2)]
        rows.append([str(i), age, town, member, f"name {i}", ("no", "yes", "no")[i % 3]])
    return rows


def write(path, rows, header=HEADER):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
            [header, *rows]
        )
    return str(path)


def table(path, **fields):
    return Table(**{"path": str(path), "target": "label", "ignore": ("id", "name")} | fields)


def transform(splits):
    return Transform.loads(splits.files["table.json"])


def line_of(path, i):
    """The line in which data row i begins."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        places = [1, *(reader.line_num + 1 for _ in reader)]
    return places[i + 1]


# --- What training rows decide ---


def test_what_inputs_are(tmp_path):
    rows = [
        [a, t, m, y]
        for a, t, m, y in zip(
            ["1", "2", "", "6"] * 3,
            ["b", "a", "", "b"] * 3,
            ["yes", "no", "", "no"] * 3,
            "0101" * 3,
            strict=True,
        )
    ]
    path = write(tmp_path / "x.csv", rows, ["age", "town", "member", "y"])
    test = write(
        tmp_path / "t.csv",
        [["", "c", "", "1"], ["4", "a", "true", "0"]],
        ["age", "town", "member", "y"],
    )
    source = Table(path=path, test=test, target="y", validation=0, indicators=("age",))
    data = source.load()
    assert transform(data).inputs == [
        "age",
        "age <missing>",
        "town a",
        "town b",
        "town <missing>",
        "town <other>",
        "member",
    ]
    age, member = np.array([1, 2, 2, 6.0]), np.array([1, 0, 0, 0.0])  # filled by the median
    scaled = (age - age.mean()) / age.std(), (member - member.mean()) / member.std()
    expected = np.array(
        [
            [scaled[0][0], 0, 0, 1, 0, 0, scaled[1][0]],
            [scaled[0][1], 0, 1, 0, 0, 0, scaled[1][1]],
            [scaled[0][2], 1, 0, 0, 1, 0, scaled[1][2]],
            [scaled[0][3], 0, 0, 1, 0, 0, scaled[1][3]],
        ]
    )
    train = data["train"].rows
    np.testing.assert_allclose(train["inputs"], np.tile(expected, (3, 1)), rtol=1e-6)
    np.testing.assert_array_equal(train["targets"], [0, 1] * 6)
    assert train["inputs"].dtype == np.float32
    assert train["targets"].dtype == np.int32
    np.testing.assert_allclose(
        data["test"].rows["inputs"],
        [
            [scaled[0][1], 1, 0, 0, 0, 1, scaled[1][1]],
            [(4 - age.mean()) / age.std(), 0, 1, 0, 0, 0, scaled[1][0]],
        ],
        rtol=1e-6,
    )
    mean = dataclasses.replace(source, fill="mean").load()["train"].rows["inputs"]
    np.testing.assert_allclose(mean[2, 0], 0, atol=1e-6)


def test_only_training_rows_move_training_inputs(tmp_path):
    rows = cells()
    path = tmp_path / "x.csv"
    write(path, rows)
    before = table(path).load()
    moved = dict.fromkeys(before, 0)
    for i in range(len(rows)):
        changed = [list(row) for row in rows]
        changed[i][1:4] = "1e6", "Rome", "true"
        write(path, changed)
        after = table(path).load()
        same = {
            name: fingerprint({"": before[name]}) == fingerprint({"": after[name]})
            for name in before
        }
        if same["train"]:
            assert transform(after) == transform(before)
            assert sum(same.values()) == 2
            moved["test" if not same["test"] else "validation"] += 1
        else:
            moved["train"] += 1
    assert moved == {name: len(split) for name, split in before.items()}


def test_constant_columns_and_rare_categories(tmp_path):
    rows = [["0.1", "a", "0"], ["0.1", "b", "1"]] * 10 + [["0.1", "rare", "1"]]
    path = write(tmp_path / "x.csv", rows, ["flat", "word", "y"])
    test = write(tmp_path / "t.csv", [["2.1", "rare", "0"]], ["flat", "word", "y"])
    data = Table(path=path, test=test, target="y", validation=0, min_count=2).load()
    number, category = transform(data).columns
    assert (number.mean, number.std) == (0.1, 1.0)
    assert category.words == ("a", "b")
    assert not data["train"].rows["inputs"][:, 0].any()
    np.testing.assert_allclose(data["test"].rows["inputs"], [[2, 0, 0, 0, 1]], rtol=1e-6)
    assert transform(data).inputs[-2:] == [f"word {MISSING}", f"word {OTHER}"]


def test_kinds_are_inferred_and_chosen(tmp_path):
    header = ["code", "mixed", "flag", "y"]
    rows = [[str(i % 3), str(i) if i != 5 else "x", "yes", str(i % 2)] for i in range(30)]
    path = write(tmp_path / "x.csv", rows, header)
    source = Table(path=path, target="y", split=1)
    code, mixed, flag = transform(source.load()).columns
    assert isinstance(code, Number)
    assert not code.boolean
    assert isinstance(mixed, Category)
    assert flag.boolean
    (code, *_) = transform(dataclasses.replace(source, categories=("code",)).load()).columns
    assert code.words == ("0", "1", "2")
    with pytest.raises(UserError, match=r"x\.csv, line 7: mixed is 'x', and not a number"):
        dataclasses.replace(source, numbers=("mixed",)).load()
    with pytest.raises(UserError, match=r"mixed has .* or add it to numbers, where 'x' is a bad"):
        dataclasses.replace(source, max_categories=10).load()
    notes = "\n".join(source.load().notes)
    assert "numbers: code\ntruth values: flag\ncategories: mixed (" in notes


def test_what_a_target_is(tmp_path):
    def of(labels, **fields):
        path = write(tmp_path / "x.csv", [["1", y] for y in labels], ["a", "label"])
        data = Table(path=path, target="label", validation=0, test_share=0, **fields).load()
        return transform(data).classes, data["train"].rows["targets"]

    classes, targets = of(["10", "9", "10.0", "9"])
    assert classes == ("9", "10")
    np.testing.assert_array_equal(targets, [1, 0, 1, 0])
    assert targets.dtype == np.int32
    assert of(["b", "a", "b"])[0] == ("a", "b")
    classes, targets = of(["0.5", "1", "2"])
    assert classes is None
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(targets, [[0.5], [1], [2]])
    assert of(map(str, range(21)))[0] is None
    assert len(of(map(str, range(20)))[0]) == 20
    assert len(of(map(str, range(21)), kind="classes")[0]) == 21
    assert of(["1", "0"], kind="regression")[0] is None
    classes, targets = of(["no", "yes"], classes=("yes", "no", "maybe"))
    assert classes == ("yes", "no", "maybe")
    np.testing.assert_array_equal(targets, [1, 0])


# --- Reading ---


def test_quoted_commas_quotes_and_newlines(tmp_path):
    rows = cells()
    path = write(tmp_path / "x.csv", rows)
    town = next(c for c in transform(table(path).load()).columns if c.name == "town")
    assert town.words == tuple(sorted(TOWNS))


def test_tabs_separators_spaces_empty_lines_and_a_byte_order_mark(tmp_path):
    mark = fingerprint(table(write(tmp_path / "x.csv", cells())).load())
    assert fingerprint(table(write(tmp_path / "x.tsv", cells())).load()) == mark
    plain = [[cell.replace(",", "").replace("\n", "") for cell in row] for row in cells()]
    text = "\r\n\r\n".join(" ; ".join(row) for row in [HEADER, *plain])
    (tmp_path / "y.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = table(tmp_path / "y.txt", separator=";").load()
    expected = table(write(tmp_path / "y.csv", plain)).load()
    assert fingerprint(found) == fingerprint(expected)


def test_parquet_is_as_csv(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = cells()
    of = {
        "id": int,
        "age": float,
        "town": str,
        "member": lambda cell: cell == "true",
        "name": str,
        "label": str,
    }
    columns = {
        name: [of[name](row[i]) if row[i] else None for row in rows]
        for i, name in enumerate(HEADER)
    }
    columns["town"] = pyarrow.array(columns["town"]).dictionary_encode()
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    for fields in (
        {},
        {"missing": "drop"},
        {"target": "age", "ignore": ("id", "name", "label"), "on_bad": "skip"},
    ):
        found = table(tmp_path / "x.parquet", **fields).load()
        expected = table(write(tmp_path / "x.csv", rows), **fields).load()
        assert fingerprint(found) == fingerprint(expected)
        assert found.files == expected.files

    columns["age"] = [float("nan"), *columns["age"][1:]]
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 1: age is nan: a number must be finite"):
        table(tmp_path / "x.parquet").load()
    (tmp_path / "y.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"y\.parquet is no Parquet file"):
        table(tmp_path / "y.parquet").load()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'ergon\[parquet\]'") as refused:
        table(tmp_path / "x.parquet").load()
    assert "\n" not in str(refused.value)


# --- Splits ---


@pytest.mark.parametrize("split", [0, 1, 2])
def test_splits_are_stratified_shares(tmp_path, split):
    rows = [[str(i), "abc"[(i % 10) // 4]] for i in range(997)]
    path = write(tmp_path / "x.csv", rows, ["a", "y"])
    data = Table(path=path, target="y", split=split, validation=0.15, test_share=0.25).load()
    whole = np.bincount(["abc".index(y) for _, y in rows])
    assert list(data) == ["train", "validation", "test"]
    for name, share in {"train": 0.6, "validation": 0.15, "test": 0.25}.items():
        assert abs(len(data[name]) - share * 997) < 1
        counts = np.bincount(data[name].rows["targets"])
        np.testing.assert_allclose(counts, share * whole, atol=2)
    first = transform(data).columns[0]
    inputs = np.concatenate([data[name].rows["inputs"][:, 0] for name in data])
    ids = inputs.astype(np.float64) * first.std + first.mean
    np.testing.assert_allclose(np.sort(ids), np.arange(997), atol=1e-3)


def test_a_split_is_its_seed_s(tmp_path):
    path = write(tmp_path / "x.csv", cells())
    marks = [fingerprint(table(path, split=k).load()) for k in (0, 0, 1)]
    assert marks[0] == marks[1] != marks[2]


def test_a_class_of_one_row_is_trained_on(tmp_path):
    path = write(tmp_path / "x.csv", [["1", "ab"[i == 7]] for i in range(40)], ["a", "y"])
    for split in range(10):
        data = Table(path=path, target="y", split=split).load()
        assert data["train"].rows["targets"].sum() == 1


def test_labels_that_differ_by_what_numpy_strips(tmp_path):
    path = write(tmp_path / "x.csv", [["1", ("b", "b\0")[i % 2]] for i in range(40)], ["a", "y"])
    data = Table(path=path, target="y").load()
    assert transform(data).classes == ("b", "b\0")
    assert [int(split.rows["targets"].sum()) for split in data.values()] == [14, 2, 4]


def test_regression_is_split_too(tmp_path):
    path = write(tmp_path / "x.csv", [[str(i), str(i / 7)] for i in range(100)], ["a", "y"])
    data = Table(path=path, target="y").load()
    assert [len(data[name]) for name in data] == [70, 10, 20]
    targets = np.concatenate([split.rows["targets"] for split in data.values()])
    assert targets.shape == (100, 1)
    np.testing.assert_allclose(np.sort(targets, axis=0)[:, 0], np.arange(100) / 7, rtol=1e-6)


def test_a_second_file_is_the_test(tmp_path):
    rows = cells()
    path = write(tmp_path / "x.csv", rows)
    order = [5, 1, 3, 2]
    test = write(
        tmp_path / "t.csv",
        [[row[i] for i in order] for row in rows[:9]],
        [HEADER[i] for i in order],
    )  # columns in another order, ignored ones absent
    data = table(path, test=test, validation=0).load()
    np.testing.assert_array_equal(data["test"].rows["inputs"], data["train"].rows["inputs"][:9])
    np.testing.assert_array_equal(data["test"].rows["targets"], data["train"].rows["targets"][:9])


def test_rows_with_missing_cells_are_dropped_and_counted(tmp_path):
    rows = cells()
    full = [row for row in rows if all(row[1:4])]
    assert 0 < len(full) < len(rows)
    path = write(tmp_path / "x.csv", rows)
    found = table(path, missing="drop").load()
    expected = table(write(tmp_path / "y.csv", full), missing="drop").load()
    assert fingerprint(found) == fingerprint(expected)
    n = len(rows) - len(full)
    assert f"{path}: {n} of 60 rows dropped, for a cell is missing" in found.notes
    with pytest.raises(UserError, match="row 0: age is missing, and rows with missing cells were"):
        transform(found).apply([{"age": None, "town": "Bern", "member": True}])
    with pytest.raises(UserError, match="row 0: town is missing, and rows with missing cells were"):
        transform(found).apply([{"age": 4, "town": "", "member": True}])


def test_other_words_for_a_missing_cell(tmp_path):
    rows = cells()
    mark = fingerprint(table(write(tmp_path / "x.csv", rows)).load())
    marked = [[cell or "NA" for cell in row] for row in rows]
    data = table(write(tmp_path / "y.csv", marked), missing_values=("NA",)).load()
    assert fingerprint(data) == mark
    raw = [{"age": "NA", "town": "NA", "member": "NA"}, {"age": "", "town": None, "member": None}]
    first, second = transform(data).apply(raw)
    np.testing.assert_array_equal(first, second)


# --- Bad rows ---


def spoiled(tmp_path, i, change):
    """A table whose row i was changed: a list of cells, or bytes."""
    rows = cells()
    path = tmp_path / "x.csv"
    write(path, rows)
    line = line_of(path, i)
    if isinstance(change, dict):
        for name, cell in change.items():
            rows[i][HEADER.index(name)] = cell
        write(path, rows)
    else:
        before, after = tmp_path / "a.csv", tmp_path / "b.csv"
        write(before, rows[:i])
        write(after, rows[i + 1 :], rows[i + 1])
        rest = tmp_path / "c.csv"
        write(rest, rows[i + 2 :], rows[i + 1])
        path.write_bytes(before.read_bytes() + change + b"\r\n" + rest.read_bytes())
    return path, line


BAD = {
    "few cells": (b"17,22", "2 cells, and the header has 6"),
    "one cell": (b"17", "1 cell, and the header has 6"),
    "many cells": (b"17,22,Bern,true,name,no,more", "7 cells, and the header has 6"),
    "not UTF-8": (b"17,22,K\xf6ln,true,name,no", "not UTF-8"),
    "not UTF-8 where ignored": (b"17,22,Bern,true,\xff,no", "not UTF-8"),
    "quotes": (b'17,22,"Bern"x,true,name,no', "',' expected after '\"'"),
    **{
        cell: (
            {"age": cell},
            f"age is {cell}: a number must be finite, and a missing cell empty, or among "
            f"missing_values as {cell}",
        )
        for cell in ("nan", "-inf")
    },
    "label missing": ({"label": ""}, "label, the target, is missing"),
    "label unknown": ({"label": "maybe"}, "label is 'maybe', which is none of the classes no, yes"),
}


@pytest.mark.parametrize("i", [0, 31, 58])
@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_or_keep_their_places(tmp_path, name, i):
    change, reason = BAD[name]
    fields = {"classes": ("no", "yes"), "on_bad": "raise"}
    path, line = spoiled(tmp_path, i, change)
    with pytest.raises(UserError) as refused:
        table(path, **fields).load()
    assert str(refused.value) == f"{path}, line {line}: {reason}"

    data = table(path, **fields | {"on_bad": "skip"}).load()
    assert sum(len(split) for split in data.values()) == 60
    (where,) = [split for split in data.values() if split.rows["bad"].any()]
    assert where.rows["bad"].sum() == 1
    at = int(np.flatnonzero(where.rows["bad"])[0])
    assert not where.rows["inputs"][at].any()
    assert not where.rows["targets"][at].any()
    batches = where.evaluation(7)
    weights = np.concatenate([batch["weights"] for batch in batches])
    assert weights.sum() == len(where) - 1
    assert weights[at] == 0
    assert data.notes[-1] == f"1 bad row skipped, first {path}, line {line}: {reason}"
    # As if the row were not there, for all that training rows decide.
    good = {name: split.rows["inputs"][~split.rows["bad"]] for name, split in data.items()}
    age = transform(data).columns[0]
    raw = good["train"][:, 0].astype(np.float64)
    np.testing.assert_allclose([raw.mean(), raw.std()], [0, 1], atol=1e-5)
    assert age.fill is not None


def test_bad_rows_of_the_test_file(tmp_path):
    path = write(tmp_path / "x.csv", cells())
    for change, reason in (
        ({"age": "old"}, "age is 'old', and not a number"),
        ({"member": "perhaps"}, "member is 'perhaps', and not true or false"),
        ({"label": "maybe"}, "label is 'maybe', which is none of the classes no, yes"),
        ({"age": "1e300"}, "age is 1e300, too large beside the training rows'"),
    ):
        rows = cells(12, seed=1)
        for name, cell in change.items():
            rows[4][HEADER.index(name)] = cell
        test = write(tmp_path / "t.csv", rows)
        line = line_of(test, 4)
        with pytest.raises(UserError) as refused:
            table(path, test=test).load()
        assert str(refused.value) == f"{test}, line {line}: {reason}"
        skipped = table(path, test=test, on_bad="skip").load()
        np.testing.assert_array_equal(skipped["test"].rows["bad"], np.arange(12) == 4)
        assert not skipped["train"].rows["bad"].any()
        assert not skipped["test"].rows["inputs"][4].any()


def test_a_row_is_bad_once_and_max_bad_are_borne(tmp_path):
    rows = cells()
    for i in (3, 20, 41):
        rows[i][1] = "nan"
        rows[i][5] = ""
    path = write(tmp_path / "x.csv", rows)
    data = table(path, on_bad="skip", max_bad=3).load()
    assert sum(split.rows["bad"].sum() for split in data.values()) == 3
    assert data.notes[-1].startswith("3 bad rows skipped, first ")
    with pytest.raises(UserError, match=r"more than max_bad = 2 bad rows; .*, line "):
        table(path, on_bad="skip", max_bad=2).load()


def test_regression_has_bad_targets_too(tmp_path):
    rows = [[str(i), str(i / 7)] for i in range(50)]
    for bad, reason in (
        ("", "y, the target, is missing"),
        ("nan", "y is nan: a number must be finite"),
        ("x", "y is 'x', and not a number"),
        ("1e39", "y, the target, is 1e39, too large for float32"),
    ):
        rows[9][1] = bad
        path = write(tmp_path / "x.csv", rows, ["a", "y"])
        source = Table(path=path, target="y", kind="regression")
        with pytest.raises(UserError, match=f"line 11: {reason}"):
            source.load()
        data = dataclasses.replace(source, on_bad="skip").load()
        assert sum(split.rows["bad"].sum() for split in data.values()) == 1
        assert all(np.isfinite(split.rows["targets"]).all() for split in data.values())


# --- What is no table ---


def test_files_that_are_no_tables(tmp_path):
    def refused(match, content, name="x.csv", **fields):
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UserError, match=match) as found:
            Table(**{"path": str(tmp_path / name), "target": "y"} | fields).load()
        assert "\n" not in str(found.value)

    refused(r"x\.csv, line 1: the file is empty", "")
    refused("the train split is empty: .* has 0 rows", "a,y\n", validation=0, test_share=0)
    refused("the validation split is empty: .* has 4 rows", "a,y\n1,0\n2,1\n3,0\n4,1\n")
    refused("column 1 has no name", ",y\n1,0\n")
    refused("two columns are named a", "a,y,a\n1,0,1\n")
    refused("line 1: not UTF-8", b"\xff,y\n1,0\n")
    refused("line 3: a quote is not closed", 'a,y\n1,0\n"2,1\n3,0\n')
    refused(r"has no column y, which target names; it has a, b$", "a,b\n1,0\n")
    refused(r"has no column c, which ignore names; it has a, y$", "a,y\n1,0\n", ignore=("c",))
    refused("no column left to predict y from", "y\n1\n")
    refused("ends in none of .csv, .txt", "a,y\n", name="x.xlsx")
    rows = "".join(f"{i},,{i % 2}\n" for i in range(30))
    refused("column b has no cell in any training row", "a,b,y\n" + rows)
    refused("a cell is missing in every row", "a,b,y\n" + rows, missing="drop")
    refused("y has one class, 0", "a,y\n" + "1,0\n" * 30)
    refused("the target y has 60 classes", "a,y\n" + "".join(f"1,w{i}\n" for i in range(60)))
    refused(
        "column a has .* different values .* max_categories = 5",
        "a,y\n" + "".join(f"w{i},{i % 2}\n" for i in range(60)),
        max_categories=5,
    )
    refused("every training row is bad", "a,y\n" + "1\n" * 30, on_bad="skip")
    refused("every training row is bad", "a,y\n" + "1\n" * 30, on_bad="skip", missing="drop")
    refused(
        "a, which indicators names, is no number", "a,y\n" + "v,0\nw,1\n" * 20, indicators=("a",)
    )
    with pytest.raises(UserError, match="is a folder"):
        Table(path=str(tmp_path), target="y").load()
    with pytest.raises(UserError, match="no data at"):
        Table(path=str(tmp_path / "absent.csv"), target="y").load()


def test_columns_that_differ(tmp_path):
    path = write(tmp_path / "x.csv", cells())
    without = write(tmp_path / "t.csv", [row[:-1] for row in cells()], HEADER[:-1])
    with pytest.raises(UserError, match=r"t\.csv has no column label, and .*x\.csv has one"):
        table(path, test=without).load()
    more = write(tmp_path / "m.csv", [[*row, "1"] for row in cells()], [*HEADER, "more"])
    with pytest.raises(UserError, match=r"m\.csv has a column more, and .*x\.csv has none"):
        table(path, test=more).load()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"validation": 0.5, "test_share": 0.5}, "leave no rows to train on"),
        ({"kind": "regression", "classes": ("a",)}, "a regression has no classes"),
        ({"classes": ("a", "a")}, "twice"),
        ({"ignore": ("label",)}, "the target label is in ignore"),
        ({"categories": ("age",), "numbers": ("age",)}, "age is in categories, and in numbers"),
        ({"categories": ("age",), "indicators": ("age",)}, "age is in categories, and in numbers"),
        ({"separator": "||"}, "one character"),
        ({"missing": "drop", "indicators": ("age",)}, "drop drops those rows"),
    ],
)
def test_fields_that_do_not_go_together(fields, match):
    with pytest.raises(UserError, match=match):
        table("x.csv", **fields)
    table("x.csv", validation=0.5, test_share=0.5, test="t.csv")


def test_a_batch_larger_than_the_data(tmp_path):
    path = write(tmp_path / "x.csv", cells())
    e = tiny.mlp(data=table(path), batch_size=64)
    with pytest.raises(UserError, match="batch_size 64 exceeds the 42 training examples"):
        prepare(e, tiny.ONE)


# --- What a run keeps ---


def test_raw_rows_are_read_by_what_a_run_kept(tmp_path):
    train_rows, test_rows = cells(), cells(15, seed=2)
    path = write(tmp_path / "x.csv", train_rows)
    test = write(tmp_path / "t.csv", test_rows)
    source = table(path, test=test, indicators=("age",))
    width = len(transform(source.load()).inputs)
    e = tiny.mlp(data=source, model=MLPConfig(features=width, sizes=(4, 2)), steps=2)
    setup = prepare(e, tiny.ONE)
    train(setup, tmp_path / "run", quiet=True)
    kept = Transform.loads((tmp_path / "run" / "table.json").read_text())
    assert kept.classes == ("no", "yes")
    assert "numbers: age" in (tmp_path / "run" / "log.txt").read_text()

    trained_on = setup.splits["test"].rows
    raw = [dict(zip(HEADER, row, strict=True)) for row in test_rows]
    np.testing.assert_array_equal(kept.apply(raw), trained_on["inputs"])
    np.testing.assert_array_equal(
        [kept.classes.index(row["label"]) for row in raw], trained_on["targets"]
    )
    columns = {name: [row[name] for row in raw] for name in HEADER[1:4]}
    np.testing.assert_array_equal(kept.apply(columns), trained_on["inputs"])
    values = {
        "age": [float(cell) if cell else None for cell in columns["age"]],
        "town": columns["town"],
        "member": [cell == "true" if cell else None for cell in columns["member"]],
    }
    np.testing.assert_array_equal(kept.apply(values), trained_on["inputs"])

    for rows, match in (
        ([raw[0], {**raw[1], "age": "old"}], "row 1: age is 'old', and not a number"),
        ([raw[0], {"age": 3}], "row 1 has no column town"),
        ({"age": [3]}, "the rows have no column town"),
        ({"age": [3], "town": [], "member": []}, "not of one length"),
        ({"age": [3], "town": [b"\xff"], "member": ["no"]}, "bytes that are not UTF-8"),
    ):
        with pytest.raises(UserError, match=match):
            kept.apply(rows)


def test_a_transform_survives_json(tmp_path):
    path = write(tmp_path / "x.csv", cells())
    for fields in (
        {"indicators": ("age",), "missing_values": ("NA",)},
        {"missing": "drop"},
        {"target": "age", "ignore": ("name", "label", "id"), "on_bad": "skip"},
    ):
        text = table(path, **fields).load().files["table.json"]
        assert Transform.loads(text).dumps() == text
    damaged = json.loads(text)
    del damaged["columns"][0]["kind"]
    for other in ("", "[]", "{}", "{", json.dumps(damaged)):
        with pytest.raises(UserError, match=r"this is no table\.json"):
            Transform.loads(other)


def test_a_regression_trains(tmp_path):
    rows = [[str(i), repr(3 * i / 70 + 1)] for i in range(100)]
    source = Table(path=write(tmp_path / "x.csv", rows, ["a", "y"]), target="y")
    e = tiny.lines(data=source, model=MLPConfig(features=1, sizes=(1,)), steps=1000)
    summary = train(prepare(e, tiny.ONE), tmp_path / "run", quiet=True)
    assert summary.metrics["validation"]["r2"] > 0.95


def test_a_run_goes_on_only_with_the_same_table(tmp_path):
    path = write(tmp_path / "x.csv", cells())
    e = tiny.mlp(data=table(path), model=MLPConfig(features=8, sizes=(4, 2)), steps=2)
    train(prepare(e, tiny.ONE), tmp_path / "run", quiet=True)
    more = dataclasses.replace(e, steps=3)
    assert train(prepare(more, tiny.ONE), tmp_path / "run", quiet=True).step == 3
    write(path_of := pathlib.Path(path), cells(seed=3))
    setup = prepare(dataclasses.replace(e, steps=4), tiny.ONE)
    with pytest.raises(UserError, match="was trained on data"):
        run.check(tmp_path / "run", setup.experiment, setup.fingerprint)
    assert path_of.exists()


TITANIC = pathlib.Path(os.environ.get("ERGON_DATA") or "../shared/data") / "tables/titanic.csv"


WINES = [
    {
        "features": {"alcohol": 9.4 + i % 5 / 10, "ice": i % 2 == 0, "of": {"year": 1990 + i}},
        "region": ("Jura", "Béarn", "")[i % 3],
        "km/h": i % 7,
        "stars": i % 3,
        "quality": i % 2,
    }
    for i in range(40)
]


@pytest.fixture(scope="module")
def wines(tmp_path_factory):
    """A TFDS data set of single values, some within a feature, and of things that are no images."""
    root = tmp_path_factory.mktemp("wines")
    kinds = tfds.features
    within = {
        "alcohol": kinds.Scalar(np.float64),
        "ice": kinds.Scalar(np.bool_),
        "of": kinds.FeaturesDict({"year": np.int64}),
        "label": kinds.Image(shape=(2, 2, 1)),
    }
    features = {
        "features": kinds.FeaturesDict(within),
        "region": kinds.Text(),
        "km/h": kinds.Scalar(np.int32),
        "stars": kinds.ClassLabel(names=["3", "2", "1"]),
        "quality": kinds.ClassLabel(names=["sour", "fine", "rare"]),
        "bottle": kinds.Image(shape=(2, 2, 1)),
    }
    bad = {**WINES[1], "features": {**WINES[1]["features"], "alcohol": float("nan")}}
    splits = {"train": WINES, "test": WINES[:3], "odd": [WINES[0], bad]}
    splits["none"] = [{**WINES[0], "quality": -1}]
    (root / "bottle.png").write_text("no image: it is not to be decoded")
    file = str(root / "bottle.png")
    splits = {
        name: [
            row | {"bottle": file, "features": row["features"] | {"label": file}} for row in rows
        ]
        for name, rows in splits.items()
    }
    made.data_set(root, "wines", features, splits)
    ignored = ("bottle", "features/label")
    return {"tfds": "wines", "data_dir": str(root), "target": "quality", "ignore": ignored}


def test_rows_of_tfds_are_those_of_a_file(wines, tmp_path):
    ours = Table(**wines, path="train", test="test").load()
    names = ["alcohol", "ice", "label", "of/year"]
    names = [
        "bottle",
        *(f"features/{name}" for name in names),
        "km/h",
        "quality",
        "region",
        "stars",
    ]

    def row(wine):
        alcohol, ice, of = wine["features"].values()
        year, speed, region = of["year"], wine["km/h"], wine["region"]
        quality, stars = ("sour", "fine")[wine["quality"]], 3 - wine["stars"]
        ice = str(ice).lower()
        return ["", round(alcohol, 1), ice, "", year, speed, quality, region, stars]

    rows = list(map(row, WINES))
    given = {"target": "quality", "ignore": wines["ignore"], "categories": ("stars",)}
    given["classes"] = ("sour", "fine", "rare")  # as TFDS has them
    file = write(tmp_path / "wines.csv", rows, names)
    test = write(tmp_path / "test.csv", rows[:3], names)
    theirs = Table(**given, path=file, test=test).load()
    assert ours.files == theirs.files
    assert ours.notes == theirs.notes
    assert list(ours) == ["train", "validation", "test"]
    assert fingerprint(ours) == fingerprint(theirs)
    raw = {"features/alcohol": 9.4, "features/ice": True, "features/of/year": 2000, "km/h": 1}
    raw |= {"region": "Béarn".encode(), "stars": 3}
    apart = transform(ours).apply([raw])
    assert apart[0, transform(ours).inputs.index("region Béarn")] == 1
    part = Table(**wines, path="train[:50%]", test_share=0.1, missing="drop").load()
    assert "wines/1.0.0 train[:50%]: 6 of 20 rows dropped, for a cell is missing" in part.notes
    kept = Table(**wines, path="train", missing_values=("9.4",), categories=("features/alcohol",))
    (alcohol,) = (c for c in transform(kept.load()).columns if c.name == "features/alcohol")
    assert alcohol.words == ("9.5", "9.6", "9.7", "9.8")


def test_a_number_of_classes_is_one_of_classes(wines):
    stars = Table(
        **wines | {"target": "stars", "ignore": (*wines["ignore"], "quality")}, path="train"
    )
    assert transform(stars.load()).classes == ("3", "2", "1")
    number = dataclasses.replace(stars, kind="regression")
    assert transform(number.load()).classes is None
    column = Table(**wines, path="train", numbers=("stars",)).load()
    assert [type(c) for c in transform(column).columns if c.name == "stars"] == [Number]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ignore": ()},
            r"a column is of one value a row, and not so bottle \(Image\), features/label \(Im",
        ),
        (
            {"target": "alcohol"},
            "wines/1.0.0 train has no column alcohol, which target names; it has bottle, features/",
        ),
        (
            {"test": "odd"},
            r"wines-odd.*, row 1: features/alcohol is nan.* among missing_values as nan",
        ),
        ({"test": "none"}, r"wines-none.*, row 0: quality is '', which is none of"),
        ({"path": "trial"}, "wines/1.0.0: the split trial cannot be read"),
        ({"separator": ";"}, "separator is between cells of files, and wines is TFDS's"),
    ],
)
def test_mistakes_about_rows_of_tfds(wines, fields, message):
    with pytest.raises(UserError, match=message):
        Table(**{"path": "train"} | wines | fields).load()


def test_what_prepare_data_writes_of_a_table_is_read(tmp_path):
    rows = [[str(i), f"{i / 8}", ("no", "yes")[i % 2]] for i in range(30)]
    file = write(tmp_path / "plain.csv", rows, ["age", "size", "label"])
    options = {"source": pathlib.Path(file), "kind": "table", "label": "label"}
    preparing.prepare(preparing.Options(**options, name="plain", out=tmp_path / "tfds"))
    source = Table(tfds="plain", data_dir=str(tmp_path / "tfds"), path="train", target="label")
    assert fingerprint(source.load()) == fingerprint(Table(path=file, target="label").load())


@pytest.mark.skipif(not TITANIC.exists(), reason=f"{TITANIC} is not there")
def test_titanic():
    path = str(TITANIC.resolve())
    source = Table(
        path=path,
        target="Survived",
        ignore=("PassengerId", "Name", "Ticket", "Cabin"),
        categories=("Pclass",),
    )
    data = source.load()
    assert sum(map(len, data.values())) == 891
    assert sum(split.rows["targets"].sum() for split in data.values()) == 342
    kept = transform(data)
    kinds = {c.name: type(c) for c in kept.columns}
    assert kinds == {
        **dict.fromkeys(["Pclass", "Sex", "Embarked"], Category),
        **dict.fromkeys(["Age", "SibSp", "Parch", "Fare"], Number),
    }
    dropped = dataclasses.replace(source, missing="drop").load()
    assert sum(map(len, dropped.values())) == 712
    assert any("179 of 891 rows dropped" in note for note in dropped.notes)
    with pytest.raises(UserError, match="column Name has 624 different values"):
        dataclasses.replace(source, ignore=("PassengerId",)).load()
