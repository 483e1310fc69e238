"""A benchmark's file: what is written is read, and what cannot be is refused by its field."""

import json
import math

import benchmarks
import pytest

from research import UserError
from research.bench import result as results
from research.bench.result import FIGURES, Figure, unavailable


def data(**changes):
    return json.loads(json.dumps(results.to_json(benchmarks.result()) | changes))


def changed(path, value):
    """A file whose field at a dotted path is another; `...` for one that is not there."""
    found = data()
    *way, last = path.split(".")
    place = found
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return found


def test_what_is_written_is_read():
    assert results.from_json(data()) == benchmarks.result()
    failed = benchmarks.row()
    failed = benchmarks.result(
        benchmarks.row("mlp"),
        type(failed)(**{**vars(failed), "figures": {}, "rounds": (), "failed": "no memory"}),
    )
    assert results.from_json(json.loads(json.dumps(results.to_json(failed)))) == failed


FIGURE = "rows.0.figures"
IMPOSSIBLE = [
    ("kind", "a diary", 'not a benchmark: it has no "kind": "ergon benchmark"'),
    ("kind", ..., "not a benchmark"),
    ("suite", 0, "suite must be >= 1, not 0"),
    ("suite", True, "suite must be int, not True"),
    ("date", "today", "date must be ISO 8601, not 'today'"),
    ("rows", {}, "rows must be"),
    ("machine", ..., "the file has no machine"),
    ("machine", 3, "machine must be an object, not int"),
    ("machine.devices", 0, "machine.devices must be >= 1"),
    ("machine.price", -1.0, "machine.price must be > 0"),
    ("machine.prize", 1.0, "machine has an unknown prize; did you mean price?"),
    ("peaks.matmul", {}, "peaks: peaks need rates of products"),
    ("roofs.0.flops", 0.0, "roofs.0.flops must be > 0"),
    ("rows.1.name", "cnn", "rows must have names of their own"),
    ("rows.0.rounds", [], "rows.cnn.rounds is empty"),
    ("rows.0.rounds", [0.1, -0.1], "rows.cnn.rounds must be > 0"),
    ("rows.0.rounds", [0.1, math.nan], "rows.cnn.rounds must be finite"),
    ("rows.0.intensity", "high", "rows.cnn.intensity must be float or None, not 'high'"),
    (f"{FIGURE}.hfu", ..., "rows.cnn.figures has no hfu"),
    (f"{FIGURE}.mfv", {"value": None, "qualifier": "unavailable", "how": "x"}, "unknown mfv"),
    (f"{FIGURE}.step_seconds.value", math.nan, "figures.step_seconds.value must be finite"),
    (f"{FIGURE}.compile_seconds.value", math.inf, "compile_seconds.value must be finite"),
    (f"{FIGURE}.compile_seconds.value", -2.0, "compile_seconds.value = -2 is impossible"),
    (f"{FIGURE}.step_p95.value", 0.0, "step_p95.value = 0 is impossible: it is from 0 to inf"),
    (f"{FIGURE}.step_p95.value", 0.001, "step_p95 = 0.001 is below step_p50"),
    (f"{FIGURE}.mfu_measured.value", 1.2, "figures.mfu_measured.value = 1.2 is impossible"),
    (f"{FIGURE}.input_wait.value", -1.5, "figures.input_wait.value = -1.5 is impossible"),
    (f"{FIGURE}.step_seconds.low", 0.5, "figures.step_seconds: 0.01 is not within 0.5 to"),
    (f"{FIGURE}.step_seconds.low", None, "low and high must come together"),
    (f"{FIGURE}.step_seconds.low", -1.0, "figures.step_seconds.low = -1 is impossible"),
    (f"{FIGURE}.memory.value", None, "figures.memory: value is None and qualifier 'measured'"),
    (f"{FIGURE}.memory.qualifier", "unavailable", "and qualifier 'unavailable'"),
    (f"{FIGURE}.memory.qualifier", "certain", "figures.memory.qualifier must be one of"),
    (f"{FIGURE}.memory.how", "", "figures.memory: how is empty"),
]


@pytest.mark.parametrize(("path", "value", "message"), IMPOSSIBLE)
def test_what_cannot_be_is_refused_by_its_field(path, value, message):
    with pytest.raises(UserError) as error:
        results.from_json(changed(path, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [None, [], 3, "ergon benchmark"])
def test_other_json_is_no_benchmark(other):
    with pytest.raises(UserError, match="not a benchmark"):
        results.from_json(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(results.to_json(benchmarks.result()))[:2000], "not whole JSON, cut short"),
        ("", "not whole JSON, cut short"),
        (b"\xff\xfe", "not a text file"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"mine.json: {message}"):
        results.read(path)


def test_another_version_may_have_other_figures():
    found = changed(f"{FIGURE}.hfu", ...) | {"suite": results.VERSION + 1}
    found["rows"][0]["figures"]["novel"] = {"value": 1.0, "qualifier": "measured", "how": "new"}
    row = results.from_json(found).row("cnn")
    assert list(row.figures) == list(FIGURES)
    how = f"version {results.VERSION + 1} of the suite does not have it"
    assert row.figures["hfu"] == unavailable(how)


def test_a_figure_says_how_it_was_got():
    with pytest.raises(UserError, match="how is empty"):
        Figure(value=1.0, qualifier="measured", how="")
    with pytest.raises(UserError, match=r"value is 1\.0 and qualifier 'unavailable'"):
        Figure(value=1.0, qualifier="unavailable", how="reason")
