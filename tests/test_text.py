"""Text from files: what is read, divided, cut into rows and refused."""

import csv
import itertools
import json

import made
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny

from research import UserError
from research.data import files, tokens
from research.data import prepare as preparing
from research.data.splits import Examples, Streams, Windows, fingerprint
from research.data.text import LabelledText, Text
from research.models.encoder import EncoderConfig
from research.models.transformer import TransformerConfig
from research.setup import prepare
from research.tasks import NextToken
from research.train import train

TRAIN = "to be or\nnot to be\nthat is\nthe question\n" * 3
VALIDATION = "to be that is\nthe question not\n"
KINDS = {
    "bytes": {},
    "characters": {},
    "words": {},
    "bpe": {"vocab": 270},
}
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files are found by their names, and nothing that another test kept is."""
    monkeypatch.setenv("ERGON_DATA", str(tmp_path))
    monkeypatch.setenv("ERGON_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write(folder, **texts):
    for name, text in texts.items():
        stem, _, suffix = name.rpartition("_")
        raw = text if isinstance(text, bytes) else text.encode()
        (folder / f"{stem}.{suffix}").write_bytes(raw)


def text(kind="characters", **fields):
    return Text(**{"train": "train.txt", "length": 4, "tokens": kind} | KINDS[kind] | fields)


def tokenizer(data):
    return tokens.loads(data.files["tokenizer.json"])


def decoded(data):
    return {name: tokenizer(data).decode(split.tokens) for name, split in data.items()}


@every
def test_tokens_decode_to_the_files(folder, kind):
    write(folder, train_txt=TRAIN, valid_txt=VALIDATION, test_txt=VALIDATION[:5])
    data = text(kind, validation="valid.txt", test="test.txt").load()
    assert list(data) == ["train", "validation", "test"]
    end = "\n" * (kind == "words")  # a last line ends, too
    assert decoded(data) == {"train": TRAIN, "validation": VALIDATION, "test": VALIDATION[:5] + end}
    assert data.notes == []


def test_the_last_share_of_the_characters_validates(folder):
    write(folder, train_txt="ab\u00e9d\n" * 21)
    for share, cut in ((0.1, 94), (0.5, 52), (0.25, 78)):
        given = {} if share == 0.1 else {"validation_share": share}
        data = text(**given).load()
        parts = decoded(data)
        assert list(parts) == ["train", "validation"]
        assert "".join(parts.values()) == "ab\u00e9d\n" * 21
        assert len(parts["train"]) == cut == len(data["train"].tokens)
    lines = decoded(text("words").load())
    assert lines == {"train": "ab\u00e9d\n" * 19, "validation": "ab\u00e9d\n" * 2}


@every
def test_a_vocabulary_is_of_the_training_text_alone(folder, kind):
    write(folder, train_txt=TRAIN, valid_txt=VALIDATION)
    one = text(kind, validation="valid.txt", on_bad="skip").load()
    write(folder, valid_txt=VALIDATION + "a new wörd\n" * 9)
    other = text(kind, validation="valid.txt", on_bad="skip").load()
    assert one.files == other.files
    train = [{k: v for k, v in d.items() if k == "train"} for d in (one, other)]
    assert fingerprint(train[0]) == fingerprint(train[1])
    assert fingerprint(one) != fingerprint(other)


def test_unseen_words_and_characters_are_unknown(folder):
    write(folder, train_txt=TRAIN, valid_txt="to bé\n")
    words = text("words", validation="valid.txt").load()
    assert decoded(words)["validation"] == "to <unk>\n"
    characters = text(validation="valid.txt", unknown=True).load()
    assert decoded(characters)["validation"] == "to b\ufffd\n"
    assert characters["validation"].tokens.max() == tokenizer(characters).size - 1


def test_words_are_as_many_as_are_asked_for(folder):
    write(folder, train_txt=TRAIN, valid_txt=VALIDATION)
    few = text("words", vocab=4, validation="valid.txt").load()
    assert tokenizer(few).words == ("<unk>", "<eos>", "to", "be")
    assert few["train"].tokens.max() == 3


@pytest.mark.parametrize(("size", "dtype"), [(200, np.uint8), (254, np.uint8), (255, np.uint16)])
def test_tokens_are_mapped_in_the_smallest_dtype(folder, size, dtype):
    write(folder, train_txt=" ".join(map(str, range(size))), valid_txt="1 2")
    data = text("words", validation="valid.txt").load()
    assert tokenizer(data).size == size + 2
    for split in data.values():
        assert isinstance(split.tokens, np.memmap)
        assert split.tokens.dtype == dtype
        assert split.evaluation(2)[0]["inputs"].dtype == np.int32


@pytest.mark.parametrize(("rows", "kind"), [("windows", Windows), ("streams", Streams)])
def test_batches_are_those_of_tokens_in_memory(folder, rows, kind):
    write(folder, train_txt=TRAIN, valid_txt=VALIDATION)
    data = text(validation="valid.txt", rows=rows).load()
    for name, whole in (("train", TRAIN), ("validation", VALIDATION)):
        plain = kind(tokenizer(data).encode(whole), 4)
        assert type(data[name]) is kind
        for step in range(9):
            batches = (split.batch(step, 3, 7) for split in (data[name], plain))
            np.testing.assert_equal(*batches)
        np.testing.assert_equal(*(list(split.evaluation(3)) for split in (data[name], plain)))


def test_a_file_is_read_once_and_again_when_it_changes(folder, monkeypatch):
    write(folder, train_txt=TRAIN)
    first = text().load()
    monkeypatch.setattr(Text, "_make", lambda *given: pytest.fail("read again"))
    for other in ({}, {"length": 5}, {"rows": "streams"}):
        again = text(**other).load()
        assert fingerprint(again) == fingerprint(first)
        assert again.files == first.files
    monkeypatch.undo()
    monkeypatch.setenv("ERGON_DATA", str(folder))
    monkeypatch.setenv("ERGON_CACHE", str(folder / "cache"))
    for other in ({"unknown": True}, {"validation_share": 0.2}, {"kind": "bytes"}):
        assert fingerprint(text(**other).load()) != fingerprint(first) or "unknown" in other
    write(folder, train_txt=TRAIN + "to\n")
    assert fingerprint(text().load()) != fingerprint(first)


INVALID = b"to be\nor \xff not\nto be\n"


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
def test_a_line_that_is_not_utf8(folder, kind):
    write(folder, train_txt=TRAIN, valid_txt=INVALID)
    with pytest.raises(UserError, match=r"valid\.txt, line 2: not UTF-8"):
        text(kind, validation="valid.txt").load()
    data = text(kind, validation="valid.txt", on_bad="skip").load()
    split = data["validation"]
    assert data.notes == [f"1 bad row skipped, first {folder}/valid.txt, line 2: not UTF-8"]
    clean = INVALID.replace(b"or \xff not\n", b"")
    good = split.tokens[~split.bad]
    np.testing.assert_array_equal(good, tokenizer(data).encode(clean.decode()))
    # In its place: behind the first line, whose tokens are as many as they are.
    first = len(tokenizer(data).encode("to be\n"))
    places = np.flatnonzero(split.bad)
    np.testing.assert_array_equal(places, first + np.arange(len(places)))
    if kind == "bpe":
        assert tokenizer(data).decode(split.tokens) == INVALID.decode(errors="replace")
    assert not data["train"].bad.any()
    batches = list(split.evaluation(2))
    weight = sum(b["weights"].sum() for b in batches)
    assert weight == len(good) - 1
    assert sum(b["bad"].sum() for b in batches) == len(places)


def test_bytes_are_never_bad(folder):
    write(folder, train_txt=INVALID, valid_txt=bytes(range(256)))
    data = text("bytes", validation="valid.txt").load()
    assert bytes(data["train"].tokens) == INVALID
    assert bytes(data["validation"].tokens) == bytes(range(256))


@pytest.mark.parametrize("kind", ["characters", "words", "bpe"])
def test_bad_lines_of_the_training_text_have_no_say_in_the_vocabulary(folder, kind):
    write(folder, train_txt=TRAIN.encode() + b"zebra \xff\n", valid_txt=VALIDATION)
    data = text(kind, validation="valid.txt", on_bad="skip").load()
    write(folder, train_txt=TRAIN)
    assert data.files == text(kind, validation="valid.txt").load().files
    assert data["train"].bad[-3:].all()
    assert not data["train"].bad[: len(TRAIN.split())].any()
    assert len(data.notes) == 1


def test_a_line_with_a_character_that_training_lacks(folder):
    write(folder, train_txt=TRAIN, valid_txt="to be\nto bé\nor zo\n")
    with pytest.raises(UserError, match=r"valid\.txt, line 2: the training text has no .* 'é'"):
        text(validation="valid.txt").load()
    data = text(validation="valid.txt", on_bad="skip").load()
    np.testing.assert_array_equal(data["validation"].bad, [False] * 6 + [True] * 12)
    assert data.notes[0].startswith("2 bad rows skipped, first ")
    with pytest.raises(UserError, match=r"more than max_bad = 1 bad rows; .*line 3: .*'z'"):
        text(validation="valid.txt", on_bad="skip", max_bad=1).load()


def test_lines_of_a_divided_file_keep_their_numbers(folder):
    write(folder, train_txt="a b\n" * 10 + "a z\n")
    for kind in ("characters", "words"):
        write(folder, train_txt=b"a b\n" * 10 + b"a \xff\n" + b"a b\n")
        with pytest.raises(UserError, match=r"train\.txt, line 11: not UTF-8"):
            text(kind).load()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_txt": "", "valid_txt": VALIDATION}, "train.txt has no line to train on"),
        ({"train_txt": TRAIN, "valid_txt": ""}, "valid.txt: validation has 0 tokens"),
        ({"train_txt": TRAIN, "valid_txt": "t"}, "valid.txt: validation has 1 tokens"),
        ({"train_txt": TRAIN, "valid_txt": "z!"}, "valid.txt: every line of validation is bad"),
        ({"train_txt": b"\xff\n", "valid_txt": TRAIN}, "train.txt has no line to train on"),
        ({"valid_txt": TRAIN}, "no data at train.txt"),
    ],
)
def test_texts_that_are_too_little(folder, given, message):
    write(folder, **given)
    with pytest.raises(UserError, match=message):
        text(validation="valid.txt", on_bad="skip").load()


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("bytes", {"vocab": 256}, "vocab is chosen for words and bpe"),
        ("characters", {"vocab": 99}, "vocab is chosen for words and bpe"),
        ("words", {"vocab": 2}, "vocab of words must be 3 or more, not 2"),
        ("bpe", {"vocab": 255}, "vocab of bpe must be 256 or more, not 255"),
        ("bpe", {"vocab": None}, "bpe needs vocab"),
        ("words", {"unknown": True}, "unknown is chosen for characters"),
    ],
)
def test_options_that_do_not_go_together(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        text(kind, **fields)


ROWS = [("1", "a fine film"), ("0", "a bad film"), ("1", "fine fine"), ("0", "bad a")] * 5


def table(rows, header=("label", "text"), tab="\t"):
    return "".join(tab.join(row) + "\n" for row in (header, *rows))


def labelled(**fields):
    return LabelledText(**{"train": "train.tsv", "validation": "valid.tsv", "length": 3} | fields)


def test_labelled_rows_are_padded_and_cut(folder):
    write(folder, train_tsv=table(ROWS), valid_tsv=table([("0", "film new a bad"), ("1", "fine")]))
    data = labelled().load()
    words = tokenizer(data)
    assert words.words == ("<pad>", "<unk>", "a", "fine", "film", "bad")
    assert type(data["validation"]) is Examples
    rows = data["validation"].rows
    assert rows["inputs"].tolist() == [[4, 1, 2], [3, 0, 0]]
    assert rows["lengths"].tolist() == [3, 1]
    assert rows["targets"].tolist() == [0, 1]
    assert {rows[name].dtype for name in rows} == {np.dtype(np.int32)}
    assert rows.keys() == {"inputs", "lengths", "targets"}
    for name, n in (("train", 20), ("validation", 2)):
        assert len(data[name]) == n
    train = data["train"].rows
    for i, (label, text) in enumerate(ROWS):
        assert words.decode(train["inputs"][i]) == text
        assert train["targets"][i] == int(label)
        assert train["lengths"][i] == len(text.split())


def test_csv_has_quoted_cells_and_other_columns(folder):
    head = "id,label,text\r\n"
    write(
        folder, train_csv=f'\ufeff{head}1,0,"a, ""b""\nc"\r\n2,1,d\r\n', valid_csv=f"{head}3,1,d\n"
    )
    data = labelled(train="train.csv", validation="valid.csv", length=9).load()
    assert tokenizer(data).words[2:] == ("a,", '"b"', "c", "d")
    write(folder, valid_csv=f'{head}3,1,"d\nd"\n4,x,e\n')
    with pytest.raises(UserError, match=r"valid\.csv, line 4: a label is an integer .* 'x'"):
        labelled(train="train.csv", validation="valid.csv").load()
    write(folder, valid_csv=f'{head}3,1,d\n4,1,"e\n')
    with pytest.raises(UserError, match=r"valid\.csv, line 3: a quote is not closed"):
        labelled(train="train.csv", validation="valid.csv").load()


def test_tsv_has_no_quotes(folder):
    write(folder, train_tsv=table([("0", 'say "a'), ("1", '"b" c')]), valid_tsv=table(ROWS[:2]))
    assert tokenizer(labelled().load()).words[2:] == ("say", '"a', '"b"', "c")


def test_columns_by_their_names(folder):
    header = ("sentence", "id", "class")
    rows = [("a b", "7", "1"), ("c", "8", "0")]
    write(folder, train_tsv=table(rows, header), valid_tsv=table(rows, header))
    data = labelled(text="sentence", label="class").load()
    assert data["train"].rows["targets"].tolist() == [1, 0]
    message = r"train\.tsv has no column label, which label names; it has sentence, id"
    with pytest.raises(UserError, match=message):
        labelled(text="sentence").load()
    write(folder, test_tsv=table(rows, ("sentence", "class", "id")))
    with pytest.raises(UserError, match=r"test\.tsv has the columns sentence, class, id, and .*tr"):
        labelled(text="sentence", label="class", test="test.tsv").load()
    write(folder, test_tsv=table(rows, ("sentence", "id", "klass")))
    with pytest.raises(UserError, match=r"test\.tsv has no column class"):
        labelled(text="sentence", label="class", test="test.tsv").load()


def test_a_words_vocabulary_is_of_the_training_rows(folder):
    write(folder, train_tsv=table([*ROWS, ("1", "Rare")]), valid_tsv=table([("0", "new NEW")]))
    for fields, words in (
        ({}, ("a", "fine", "film", "bad", "Rare")),
        ({"lower": True}, ("a", "fine", "film", "bad", "rare")),
        ({"min_count": 2}, ("a", "fine", "film", "bad")),
        ({"vocab": 4}, ("a", "fine")),
    ):
        data = labelled(**fields).load()
        assert tokenizer(data).words[2:] == words
        assert data["validation"].rows["inputs"].tolist() == [[1, 1, 0]]


def test_without_a_validation_file_a_share_of_each_class_validates(folder):
    rows = [(str(i % 7 // 5), f"row{i}") for i in range(140)]
    write(folder, train_tsv=table(rows))

    def parts(**fields):
        data = LabelledText(train="train.tsv", length=1, **fields)
        found = data.rows(data.bad())
        assert list(found) == ["train", "validation"]
        for part in found.values():  # in the file's order
            assert part == sorted(part, key=lambda row: int(row[0][3:]))
        both = itertools.chain(*found.values())
        assert sorted(both) == sorted((text, int(label)) for label, text in rows)
        return found

    first = parts()
    counts = np.bincount([label for _, label in first["validation"]])
    assert counts.tolist() == [10, 4]
    assert parts() == parts(split=0) == first != parts(split=1)
    assert len(parts(validation_share=0.5)["validation"]) == 70
    loaded = LabelledText(train="train.tsv", length=1).load()
    assert not set(tokenizer(loaded).words) & {text for text, _ in first["validation"]}


BAD = {
    "1\ta fine film\tmore": "3 cells, and the header has 2",
    "1": "1 cell, and the header has 2",
    "1\t \u00a0": "the text is empty",
    "one\ta film": "a label is an integer from 0, not 'one'",
    "1.0\ta film": "a label is an integer from 0, not '1.0'",
    "-1\ta film": "a label is an integer from 0, not '-1'",
    "\ta film": "a label is an integer from 0, not ''",
    "2\ta film": "no training row has the label 2",
    b"1\ta \xff film": "not UTF-8",
}


@pytest.mark.parametrize("line", BAD, ids=repr)
def test_bad_rows_are_named_or_skipped_in_their_places(folder, line):
    raw = line if isinstance(line, bytes) else line.encode()
    valid = b"label\ttext\n1\tfine\n" + raw + b"\n0\tbad a film film\n"
    write(folder, train_tsv=table(ROWS), valid_tsv=valid)
    with pytest.raises(UserError) as caught:
        labelled().load()
    assert str(caught.value) == f"{folder}/valid.tsv, line 3: {BAD[line]}"
    data = labelled(on_bad="skip").load()
    assert data.notes == [f"1 bad row skipped, first {caught.value}"]
    (batch,) = data["validation"].evaluation(4)
    assert batch["weights"].tolist() == [1, 0, 1, 0]
    assert batch["bad"].tolist() == [False, True, False, False]
    assert batch["targets"].tolist()[:3] == [1, 0, 0]
    assert batch["lengths"].tolist()[:3] == [1, 0, 3]
    assert not data["train"].rows["bad"].any()
    with pytest.raises(UserError, match=r"more than max_bad = 0 bad rows; .*line 3"):
        labelled(on_bad="skip", max_bad=0).load()


def test_bad_training_rows_keep_their_places_and_have_no_words(folder):
    rows = [*ROWS[:3], ("x", "strange"), *ROWS[3:]]
    write(folder, train_tsv=table(rows), valid_tsv=table(ROWS))
    data = labelled(on_bad="skip").load()
    assert np.flatnonzero(data["train"].rows["bad"]).tolist() == [3]
    assert "strange" not in tokenizer(data).words
    split = LabelledText(train="train.tsv", length=3, validation_share=0.5, on_bad="skip").load()
    assert sum(part.rows["bad"].sum() for part in split.values()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_tsv": "", "valid_tsv": table(ROWS)}, "train.tsv, line 1: the file is empty"),
        ({"train_tsv": table([]), "valid_tsv": table(ROWS)}, "train.tsv has no rows"),
        ({"train_tsv": table(ROWS), "valid_tsv": table([])}, "valid.tsv has no rows"),
        (
            {"train_tsv": table(ROWS), "valid_tsv": table([("3", "a")])},
            "valid.tsv: validation has no row that can be read",
        ),
        (
            {"train_tsv": table([("a", "a")]), "valid_tsv": table(ROWS)},
            "train.tsv: train has no row that can be read",
        ),
    ],
)
def test_splits_without_rows(folder, given, message):
    write(folder, **given)
    with pytest.raises(UserError, match=message):
        labelled(on_bad="skip").load()


def test_a_share_that_is_no_row_and_a_file_of_no_table(folder):
    write(folder, train_tsv=table(ROWS[:4]), train_txt=TRAIN)
    with pytest.raises(UserError, match=r"validation_share = 0\.1 of each class is no row"):
        labelled(validation=None).load()
    with pytest.raises(UserError, match=r"train\.txt has no column label"):
        labelled(train="train.txt", validation=None).load()


LAYERS = {"layers": 1, "heads": 2, "width": 8, "context": 4}


def test_streams_and_a_vocabulary_that_do_not_fit_the_model(folder):
    write(folder, train_txt=TRAIN)
    for vocab, fields, message in (
        (20, {"rows": "streams"}, "it has no initial_carry.: set data.rows to windows"),
        (9, {}, "train: tokens run to 13, and model.vocab is 9"),
    ):
        model = TransformerConfig(vocab=vocab, **LAYERS)
        with pytest.raises(UserError, match=message):
            prepare(tiny.transformer(model=model, data=text(**fields)), tiny.ONE)


def test_a_run_keeps_its_tokenizer_and_says_what_it_skipped(folder):
    """Both kinds, whole: the files beside the config, the share of bad rows, the log's line."""
    write(folder, train_txt=TRAIN, valid_txt=INVALID)
    write(folder, train_tsv=table(ROWS), valid_tsv=table([*ROWS[:3], ("x", "a")]))
    runs = {
        "text": tiny.transformer(
            model=TransformerConfig(vocab=20, **LAYERS),
            task=NextToken(unit="character"),
            data=text(validation="valid.txt", on_bad="skip"),
        ),
        "labelled": tiny.mlp(
            model=EncoderConfig(vocab=6, classes=2, **LAYERS),
            data=labelled(on_bad="skip"),
        ),
    }
    for name, e in runs.items():
        workdir = folder / name
        summary = train(prepare(e, tiny.ONE), workdir, quiet=True)
        kept = (workdir / "tokenizer.json").read_text()
        assert kept == e.data.load().files["tokenizer.json"]
        assert json.loads(kept)["kind"] == {"text": "characters", "labelled": "words"}[name]
        assert "1 bad row skipped" in (workdir / "log.txt").read_text()
        assert 0 < summary.metrics["validation"]["bad"] < 0.5
    assert files.find("train.tsv") == folder / "train.tsv"


SONGS = "la la la\nlo lo\n\nli\nlu lu lu\n\n\nle le\n"


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("line", ["la la la\n", "lo lo\n", "li\n", "lu lu lu\n", "le le\n"]),
        ("blank_line", ["la la la\nlo lo\n\n", "li\nlu lu lu\n\n\n", "le le\n"]),
    ],
)
def test_packed_rows_hold_whole_documents(tmp_path, documents, expected):
    (tmp_path / "songs.txt").write_text(SONGS)
    path = str(tmp_path / "songs.txt")
    source = Text(
        train=path, validation=path, tokens="bytes", length=40, rows="packed", documents=documents
    )
    for data in (source.load(), source.load()):  # made, and mapped
        split = data["train"]
        assert isinstance(split.tokens.base, np.memmap) or isinstance(split.tokens, np.memmap)
        found = []
        for batch in split.evaluation(1):
            for n in range(1, batch["segments"].max() + 1):
                inside = batch["segments"] == n
                ids = [batch["inputs"][inside][0], *batch["targets"][inside]]
                found.append(bytes(ids).decode())
        assert sorted(found) == sorted(expected)
        assert len(split) == sum(len(text) - 1 for text in expected)


def test_validation_of_packed_documents_is_of_whole_lines(tmp_path):
    (tmp_path / "songs.txt").write_text("0123456789\n" * 10)
    source = Text(
        train=str(tmp_path / "songs.txt"),
        tokens="bytes",
        length=10,
        rows="packed",
        validation_share=0.25,
    )
    data = source.load()
    assert len(data["train"]) == 80
    assert len(data["validation"]) == 20


@pytest.fixture(scope="module")
def poems(tmp_path_factory):
    """TFDS data sets of lines: one good, and one with a line that is no UTF-8."""
    root = tmp_path_factory.mktemp("poems")
    (root / "in").mkdir()
    (root / "in" / "train.txt").write_text("to be or\nnot to be\n\nthat is\n")
    (root / "in" / "test.txt").write_text("to or be\n")
    options = {"kind": "lines", "out": root / "tfds"}
    preparing.prepare(preparing.Options(source=root / "in", name="poems", **options))
    return str(root / "tfds")


@pytest.mark.parametrize("rows", ["windows", "streams"])
def test_rows_of_tfds_are_read_as_lines_of_a_file_are(poems, tmp_path, rows):
    for name, text in (("train", "to be or\nnot to be\n\nthat is\n"), ("test", "to or be\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    given = {"tokens": "words", "length": 3, "rows": rows}
    ours = Text(tfds="poems", data_dir=poems, train="train", validation="test", **given).load()
    file = {"train": "train.txt", "validation": "test.txt"}
    theirs = Text(**{k: str(tmp_path / v) for k, v in file.items()}, **given).load()
    assert ours.files == theirs.files
    for name in ("train", "validation"):
        np.testing.assert_array_equal(ours[name].tokens, theirs[name].tokens)
    share = Text(tfds="poems", data_dir=poems, train="train", validation_share=0.4, **given)
    assert {name: len(split) for name, split in share.load().items()} == {
        "train": 7,
        "validation": 3,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tfds": "odes"}, "has no data set odes"),
        ({"train": "training"}, "the split training cannot be read"),
        ({"feature": "line"}, "data.feature: poems has no text line; it has text"),
        ({"tokens": "characters", "validation": "test[:0]"}, "is empty"),
    ],
)
def test_mistakes_about_tfds_texts(poems, fields, message):
    given = {"tfds": "poems", "data_dir": poems, "train": "train", "validation": "test"}
    with pytest.raises(UserError, match=message):
        Text(**{**given, "tokens": "words", "length": 2} | fields).load()


def test_a_bad_row_of_tfds_is_named(poems):
    source = Text(
        tfds="poems",
        data_dir=poems,
        train="test",
        validation="train",
        tokens="characters",
        length=2,
    )
    with pytest.raises(UserError, match=r"poems-train.*, row 1: the training text has no char"):
        source.load()


COLUMNS = ("text", "label", "by", "long")
REVIEWS = [
    (f"{'good' if i % 2 else 'bad'} film,\tno. {i}", i % 2, "not read", i % 2 == 0)
    for i in range(20)
]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A TFDS data set of labelled texts, its classes named against the order of their numbers."""
    root = tmp_path_factory.mktemp("reviews")
    made.data_set(
        root,
        "reviews",
        {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["worse", "better"]),
            "by": tfds.features.Text(),
            "long": tfds.features.Scalar(np.bool_),
        },
        {
            name: [dict(zip(COLUMNS, row, strict=True)) for row in rows]
            for name, rows in {
                "train": REVIEWS,
                "test": [("a good film", 1, "", False)],
                "odd": [("a film", -1, "", False)],
                "bytes": [(b"\xff film", 0, "", False)],
            }.items()
        },
    )
    return str(root)


def test_labelled_rows_of_tfds_are_those_of_a_file(reviews, tmp_path):
    given = {"length": 4, "validation_share": 0.2, "split": 3}
    source = {"tfds": "reviews", "data_dir": reviews, "train": "train", "test": "test"}
    ours = LabelledText(**source, **given).load()
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *REVIEWS])
    (tmp_path / "test.csv").write_text("text,label,by,long\na good film,1,,no\n")
    names = {name: str(tmp_path / f"{name}.csv") for name in ("train", "test")}
    theirs = LabelledText(**names, **given).load()
    assert ours.files == theirs.files
    assert list(ours) == ["train", "validation", "test"]
    assert fingerprint(ours) == fingerprint(theirs)
    part = LabelledText(**source | {"train": "train[:50%]", "validation": "train[50%:]"}, length=4)
    assert [len(split) for split in part.load().values()] == [10, 10, 1]
    truth = LabelledText(**source, **given, label="long").load()  # 1 where it is true
    words = [
        json.loads(data.files["tokenizer.json"])["words"].index("good") for data in (ours, truth)
    ]
    for data, i, of_good in zip((ours, truth), words, (1, 0), strict=True):
        rows = data["validation"].rows
        np.testing.assert_array_equal(rows["targets"] == of_good, (rows["inputs"] == i).any(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tfds": "views"}, "has no data set views; it has: reviews"),
        ({"test": "odd"}, r"reviews-odd.*, row 0: a label is an integer from 0, not '-1'"),
        ({"test": "bytes"}, r"reviews-bytes.*, row 0: not UTF-8"),
        (
            {"text": "review"},
            "reviews/1.0.0 train has no column review, which text names; "
            "it has by, label, long, text",
        ),
        ({"test": "test[:0]"}, "is empty"),
        ({"text": "label"}, "text and label are both the column label"),
    ],
)
def test_mistakes_about_labelled_rows_of_tfds(reviews, fields, message):
    given = {"tfds": "reviews", "data_dir": reviews, "train": "train", "length": 3}
    with pytest.raises(UserError, match=message):
        LabelledText(**given | fields).load()
