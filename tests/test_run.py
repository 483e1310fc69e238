import dataclasses
import json

import pytest
import tiny

from research import UserError, record, run
from research.experiment import Target, dumps
from research.setup import prepare
from research.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps, and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    target = Target(metric="accuracy", value=0.0, split="train")
    setup = prepare(tiny.mlp(target=target, log_every=5, eval_every=6), tiny.ONE)
    return setup, workdir, train(setup, workdir, quiet=True)


def test_what_a_run_directory_holds(finished):
    setup, workdir, summary = finished
    assert (workdir / "config.json").read_text() == dumps(setup.experiment)
    about = json.loads((workdir / "environment.json").read_text())
    assert about["seed"] == 0
    assert about["data"] == setup.fingerprint
    assert {"versions", "devices", "revision", "python"} <= set(about)
    assert list((workdir / "tensorboard").iterdir())
    assert (workdir / "checkpoints/12").is_dir()
    assert (workdir / "table.txt").read_text() == run.table([summary]) + "\n"
    assert run.summary(workdir) == summary


def test_one_row_a_logged_step_or_evaluation(finished):
    _, workdir, summary = finished
    rows = record.read_metrics(workdir)
    assert [(row["step"], row["split"]) for row in rows] == [
        (5, "train"),
        (6, "validation"),
        (10, "train"),
        (12, "validation"),
        (12, "train"),
    ]
    assert set(rows[0]) == {
        *("step", "split", "loss", "accuracy", "grad_norm", "learning_rate", "seconds")
    }
    assert summary.metrics["validation"] == {k: rows[3][k] for k in ("loss", "accuracy", "ece")}
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[-1] == summary.seconds


def test_time_outside_steps_is_booked_apart(finished):
    _, _, summary = finished
    assert set(summary.apart) == {"compile", "evaluate", "save"}
    assert summary.steps_per_second == pytest.approx(12 / summary.seconds)


def test_a_run_that_would_be_another_run_is_refused_by_field(finished):
    setup, workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with pytest.raises(UserError, match=r"batch_size = 16, and this asks for 8: .*--workdir"):
        run.check(workdir, tiny.mlp(batch_size=8), setup.fingerprint)
    with pytest.raises(UserError, match=r"the data is now 000: .*changed"):
        run.check(workdir, setup.experiment, "000")
    with pytest.raises(UserError, match="already at step 12, past steps = 3"):
        run.check(workdir, tiny.mlp(steps=3), setup.fingerprint)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_what_may_change_is_told(finished):
    setup, workdir, _ = finished
    more = dataclasses.replace(setup.experiment, steps=20, keep=1)
    assert run.check(workdir, more, setup.fingerprint) == [
        "continued with steps = 20, before 12",
        "continued with keep = 1, before 2",
    ]


def test_a_run_older_than_a_field_goes_on_where_the_field_has_its_default(finished):
    setup, workdir, _ = finished
    text = (workdir / "config.json").read_text()
    stored = json.loads(text)
    del stored["model"]["dropout"], stored["ema"]
    try:
        (workdir / "config.json").write_text(json.dumps(stored))
        model = dataclasses.replace(setup.experiment.model, dropout=0.0)
        older = dataclasses.replace(setup.experiment, model=model)
        assert run.check(workdir, older, setup.fingerprint) == []
        with pytest.raises(UserError, match=r"model.dropout = 0.0, and this asks for 0.3: "):
            run.check(workdir, setup.experiment, setup.fingerprint)
        with pytest.raises(UserError, match=r"ema = null, and this asks for 0.9: "):
            run.check(workdir, dataclasses.replace(older, ema=0.9), setup.fingerprint)
    finally:
        (workdir / "config.json").write_text(text)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a run directory"):
        run.check(tmp_path, tiny.mlp(), "")
    with pytest.raises(UserError, match="is a file"):
        run.check(tmp_path / "thesis.tex", tiny.mlp(), "")
    with pytest.raises(UserError, match=r"cannot make .*: Not a directory"):
        run.start(tmp_path / "thesis.tex" / "run", tiny.mlp(), "", new=True)
    with pytest.raises(UserError, match=r"has no config\.json"):
        run.summary(tmp_path)
    assert run.check(tmp_path / "new", tiny.mlp(), "") == []


def test_an_unfinished_run_has_no_summary_and_a_broken_file_is_named(tmp_path):
    run.start(tmp_path, tiny.mlp(), "", new=True)
    with pytest.raises(UserError, match="has not finished"):
        run.summary(tmp_path)
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        run.check(tmp_path, tiny.mlp(), "")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    run.write(tmp_path, "a.json", "old")
    with pytest.raises(TypeError):
        run.write(tmp_path, "a.json", None)
    assert (tmp_path / "a.json").read_text() == "old"


def test_table():
    row = run.Summary(
        name="lstm",
        parameters=1234567,
        data="Words",
        step=10,
        early=False,
        metrics={},
        seconds=12.34,
        steps_per_second=0.81,
        apart={},
        flops_per_step=1500000000,
        flops_qualifier="exact",
        target="test accuracy >= 0.9",
        reached=0.8,
        met=False,
    )
    head, _, first, second = run.table(
        [
            row,
            dataclasses.replace(
                row,
                met=True,
                flops_qualifier="upper bound",
                steps_per_second=20.0,
                mfu=0.4123,
                mfu_of="datasheet, 2026-01-02",
            ),
        ]
    ).splitlines()
    assert head.split()[:3] == ["model", "parameters", "data"]
    assert first.split()[0:3] == ["lstm", "1,234,567", "Words"]
    assert first.split()[-6:-1] == ["0.8000", "MISSED", "12.3", "0.81", "1.5e+09"]
    assert first.endswith("unavailable")
    assert second.split()[-9:-3] == ["met", "12.3", "20", "1.5e+09", "(upper", "bound)"]
    assert second.endswith("41.2% of datasheet")


def test_judging_without_a_target(finished):
    _, _, summary = finished
    assert summary.met is True
    assert run.judge(summary, None).met is None
