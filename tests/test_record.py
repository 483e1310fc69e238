import contextlib
import fcntl
import json
import math
import os
import pty
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from research import UserError, record

ROOT = Path(__file__).parents[1]


def recorder(workdir, **options):
    return record.Recorder(workdir, **{"total_steps": 1000, "name": "run", "config": {}, **options})


def scalars(workdir, tag):
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def python(script, *arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=env, **options)


def terminal(script, *arguments, columns=120):
    """What a script prints on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = python(script, *arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunks.append(os.read(ours, 65536))
        except OSError:  # Linux's end of file on a pseudo-terminal
            break
        if not chunks[-1]:
            break
    os.close(ours)
    text = b"".join(chunks).decode()
    assert process.wait() == 0, text
    return text


def test_rows_are_on_disk_at_once(tmp_path):
    with recorder(tmp_path) as run:
        run.write(np.int64(2), "train", {"loss": np.float32(0.5), "accuracy": 1}, np.float32(3.5))
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 2, "split": "train", "loss": 0.5, "accuracy": 1.0, "seconds": 3.5}\n'
    assert record.read_metrics(tmp_path) == [json.loads(text)]


def test_rows_outlive_a_killed_process(tmp_path):
    script = """
import os, signal, sys
from research import UserError, record
run = record.Recorder(sys.argv[1], total_steps=9, name="run", config={})
for step in (1, 2, 3):
    run.write(step, "train", {"loss": 1 / step}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = python(script, tmp_path, stdout=subprocess.DEVNULL)
    assert process.wait() == -signal.SIGKILL
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    with recorder(tmp_path) as run:
        with pytest.raises(
            FloatingPointError, match=r"step 7, train: grad_norm is .*not a finite number"
        ):
            run.write(7, "train", {"loss": 1.0, "grad_norm": value}, 1.0)
        with pytest.raises(FloatingPointError, match="seconds is nan"):
            run.write(7, "train", {"loss": 1.0}, math.nan)
        run.write(8, "train", {"loss": 2.0}, 1.0)
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [8]
    assert scalars(tmp_path, "train/loss") == [(8, 2.0)]


@pytest.mark.parametrize("name", ["step", "split", "seconds"])
def test_a_metric_cannot_hide_a_column(tmp_path, name):
    with recorder(tmp_path) as run, pytest.raises(ValueError, match=f"be called '{name}'"):
        run.write(1, "train", {name: 1.0}, 1.0)
    assert record.read_metrics(tmp_path) == []


def test_tensorboard_scalars(tmp_path):
    with recorder(tmp_path) as run:
        for step in range(50):
            run.write(step, "train", {"loss": step / 2}, step)
        run.write(50, "validation", {"loss": 3.0, "accuracy": 0.25}, 50)
    assert scalars(tmp_path, "train/loss") == [(step, step / 2) for step in range(50)]
    assert scalars(tmp_path, "validation/accuracy") == [(50, 0.25)]


def test_tensorflow_is_not_imported(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from research import UserError, record
with record.Recorder(sys.argv[1] + "/run", total_steps=1, name="run", config={}) as run:
    run.write(1, "train", {"loss": 1.0}, 1.0)
"""
    process = python(script, tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert (process.communicate()[1], process.returncode) == (b"", 0)


def test_resuming_discards_what_came_after_the_checkpoint(tmp_path):
    with recorder(tmp_path) as run:
        for step in (1, 2, 3, 4):
            run.write(step, "train", {"loss": 1.0}, step)
    record.truncate(tmp_path, 2)
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1, 2]
    with recorder(tmp_path, start_step=2) as run:
        run.write(3, "train", {"loss": 9.0}, 3)
    kept = [(row["step"], row["loss"]) for row in record.read_metrics(tmp_path)]
    assert kept == [(1, 1.0), (2, 1.0), (3, 9.0)]
    # Two event files, although both were opened within a second.
    assert scalars(tmp_path, "train/loss") == kept
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_truncate_is_atomic(tmp_path, monkeypatch):
    record.truncate(tmp_path, 3)  # a crash before the first row
    with recorder(tmp_path) as run:
        run.write(5, "train", {"loss": 1.0}, 1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        record.truncate(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    record.truncate(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert record.read_metrics(tmp_path) == []


def test_a_line_cut_short_is_ignored_and_never_continued(tmp_path):
    with recorder(tmp_path) as run:
        run.write(1, "train", {"loss": 1.0}, 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 2, "split": "tr')
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1]
    with recorder(tmp_path) as run:
        run.write(3, "train", {"loss": 1.0}, 1.0)
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1, 3]
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))  # only the end of the line is missing
    assert [row["step"] for row in record.read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize("line", ['{"step": 2', "7", "{}", '{"step": 2, "loss": NaN}', ""])
def test_a_broken_line_elsewhere_is_an_error(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "split": "train"}}\n{line}\n{{"step": 3, "split": "train"}}\n')
    with pytest.raises(ValueError, match=rf"{path}, line 2: not a metrics row"):
        record.read_metrics(tmp_path)


def test_plain_lines_off_a_terminal(tmp_path, capsys):
    with recorder(tmp_path) as run:
        run.progress(100, 5.0)
        run.write(200, "train", {"loss": 1.23449, "accuracy": 0.912}, 16.26)
        run.write(200, "validation", {"loss": 12345678.0}, 18.0)
        run.message("saved step 200")
        run.write(300, "train", {"loss": 1e-5}, 28.0)
    with recorder(tmp_path, start_step=300) as run:
        run.write(400, "train", {"loss": 1.0}, 32.0)
    assert capsys.readouterr() == (
        "step 200/1000  train  loss 1.234  accuracy 0.912  12.3 steps/s\n"
        "step 200/1000  validation  loss 1.235e+07\n"
        "saved step 200\n"
        "step 300/1000  train  loss 1e-05  10 steps/s\n"
        "step 400/1000  train  loss 1  25 steps/s\n",
        "",
    )
    assert (tmp_path / "log.txt").read_text() == "saved step 200\n"


def test_quiet_prints_nothing_and_writes_everything(tmp_path, capsys):
    with recorder(tmp_path, quiet=True) as run:
        run.write(1, "train", {"loss": 1.0}, 1.0)
        run.message("hello")
    assert capsys.readouterr() == ("", "")
    assert len(record.read_metrics(tmp_path)) == 1
    assert (tmp_path / "log.txt").read_text() == "hello\n"


def test_a_disabled_recorder_does_nothing(tmp_path, capsys):
    with recorder(tmp_path / "run", enabled=False, tracker="wandb") as run:
        run.write(1, "train", {"loss": math.nan}, 1.0)
        run.progress(1, 1.0)
        run.message("hello")
    run.close()
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


BAR = """
import sys, time
from research import UserError, record
flops = float(sys.argv[2]) or None
with record.Recorder(sys.argv[1], total_steps=1000, start_step=100, name="run", config={},
                     flops_per_step=flops) as run:
    time.sleep(0.5)  # stands for compilation
    for step in range(101, 111):
        if step == 102:
            start = time.monotonic()
        time.sleep(0.05)
        run.progress(step, 20.0 / step)
        run.write(step, "train", {"loss": 1.0}, step)
    run.message("checkpoint saved")
    time.sleep(0.05)
    run.progress(111, 0.12345)
print("true speed", 10 / (time.monotonic() - start))
"""


def test_the_bar_on_a_terminal(tmp_path):
    text = terminal(BAR, tmp_path, 2e12)
    redraws = [part for part in text.replace("\n", "\r").split("\r") if part.startswith("step ")]
    assert redraws[0].startswith("step 100/1000 |")
    assert any(part.startswith(f"step {step}/") for part in redraws for step in range(102, 110))
    last = redraws[-1]
    assert last.startswith("step 111/1000 |")
    assert "loss 0.1235" in last
    # Counting the time before the first step would make it about half.
    speed = float(last.split(" steps/s")[0].split()[-1])
    assert speed == pytest.approx(float(text.split("true speed ")[1]), rel=0.1)
    assert abs(float(last.split(" TFLOP/s")[0].split()[-1]) / (2 * speed) - 1) < 0.01
    minutes, seconds = last.split("ETA ")[1].split()[0].split(":")
    assert abs(int(minutes) * 60 + int(seconds) - (1000 - 111) / speed) < 2
    assert "train" not in text
    assert "checkpoint saved" in [line.split("\r")[-1] for line in text.split("\r\n")]
    assert (tmp_path / "log.txt").read_text() == "checkpoint saved\n"
    assert len(record.read_metrics(tmp_path)) == 10


def test_the_bar_without_a_cost_model_has_no_flops(tmp_path):
    text = terminal(BAR, tmp_path, 0)
    assert "steps/s" in text
    assert "FLOP" not in text


def test_the_bar_does_not_flood_and_leaves_losses_alone(tmp_path):
    script = """
import sys, time
from research import UserError, record
class Loss:
    read = 0
    def __float__(self):
        Loss.read += 1
        return 1.0
with record.Recorder(sys.argv[1], total_steps=10**9, name="run", config={}) as run:
    start, step = time.monotonic(), 0
    while time.monotonic() < start + 1:
        step += 1
        run.progress(step, Loss())
print("calls", step, "read", Loss.read)
"""
    text = terminal(script, tmp_path)
    _, calls, _, read = text.split("\n")[-2].split()
    assert int(calls) > 1000
    assert 3 <= int(read) <= 8
    assert text.count("\r") < 15


@pytest.mark.parametrize(
    ("rate", "shown"), [(3.0, "3 "), (999.6, "1 k"), (1.5e13, "15 T"), (2e21, "2e+03 E")]
)
def test_si_prefixes(rate, shown):
    assert record._si(rate) == shown


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
@pytest.mark.parametrize("directory", [False, True])
def test_a_missing_tracker_names_the_extra(tmp_path, monkeypatch, tracker, directory):
    fake = types.ModuleType(tracker) if directory else None  # a mere directory can be imported
    monkeypatch.setitem(sys.modules, tracker, fake)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        recorder(tmp_path, tracker=tracker)
    assert str(error.value) == (
        f"tracker '{tracker}' is not installed: pip install 'ergon[{tracker}]'"
    )


def test_an_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'; known: wandb, trackio"):
        recorder(tmp_path, tracker="mlflow")


class FakeWandb(types.ModuleType):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.rows, self.defined, self.codes = [], [], [], []
        self.id = "abc"
        self.Settings = dict

    def init(self, **options):
        self.inits.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.codes.append(exit_code)


def test_wandb_is_offline_by_default_and_resumes_its_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with recorder(tmp_path, tracker="wandb", config={"seed": 3}) as run:
        run.write(4, "train", {"loss": 1.0}, 1.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(KeyError), recorder(tmp_path, tracker="wandb", start_step=2):
        raise KeyError
    first, second = fake.inits
    assert (first["mode"], first["id"], first["resume"]) == ("offline", None, None)
    assert (first["dir"], first["config"], first["name"]) == (str(tmp_path), {"seed": 3}, "run")
    assert (second["mode"], second["id"], second["resume"]) == ("online", "abc", "allow")
    assert fake.rows == [{"train/loss": 1.0, "step": 4}]
    assert fake.defined[0] == ("*", "step")
    assert fake.codes == [0, 1]


# A process each: wandb can lose a run that is resumed in its own process, and trackio reads its
# directory once.
TRACKED = """
import sys
from research import UserError, record
start = int(sys.argv[2])
with record.Recorder(sys.argv[1], total_steps=9, start_step=start, name="run", config={"seed": 1},
                     tracker=sys.argv[3], quiet=True) as run:
    run.write(start + 1, "train", {"loss": 0.5}, 1.0)
"""


def test_wandb_writes_an_offline_run_and_resumes_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for start in (0, 1):
        process = python(TRACKED, tmp_path, start, "wandb", stdout=subprocess.PIPE)
        assert (process.communicate()[0], process.returncode) == (b"", 0)
    identity = json.loads((tmp_path / "tracker.json").read_text())["wandb"]
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert all(b"train/loss" in file.read_bytes() for file in files)


def test_trackio_writes_a_local_run_and_resumes_it(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for start in (0, 1):
        process = python(TRACKED, tmp_path, start, "trackio", stdout=subprocess.PIPE)
        assert (process.communicate()[0], process.returncode) == (b"", 0)
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "ergon.db")) as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics").fetchall()
    assert [(name, step, json.loads(text)) for _, name, step, text in rows] == [
        ("run", 1, {"train/loss": 0.5}),
        ("run", 2, {"train/loss": 0.5}),
    ]
    assert rows[0][0] == rows[1][0]
