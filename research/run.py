"""The run directory: what a run leaves behind, and what a continued run may change.

config.json  environment.json  init_from.json  compute.json  metrics.jsonl  log.txt
tensorboard/  checkpoints/  summary.json  table.txt
"""

import dataclasses
import datetime
import json
import os
import pathlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from research import UserError, checkpoint, hosts, record
from research import experiment as experiments
from research.environment import environment
from research.experiment import Experiment, Target
from research.record import Recorder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished run in one row."""

    name: str
    parameters: int
    data: str
    step: int
    early: bool
    """Whether early stopping ended it."""
    metrics: dict[str, dict[str, float]]
    """By split: the metrics of the parameters after the last step, or after `best`."""
    seconds: float
    """In steps, over all sessions of the run."""
    steps_per_second: float
    """step / seconds."""
    apart: dict[str, float]
    """Seconds of the last session outside steps: compile, evaluate, save."""
    flops_per_step: int
    """Model FLOPs over all devices: matrix products and convolutions, 2 a multiply-add."""
    flops_qualifier: str
    """exact, lower bound, upper bound or estimated."""
    mfu: float | None = None
    """Model FLOPs over time and peak, of the last session's steps; None where unavailable, with the
    reason in log.txt."""
    mfu_of: str | None = None
    """The peak's source: the datasheet, or measured, and its date."""
    best: int | None = None
    """The step of the best evaluation, which the metrics are of; None: they are of the last."""
    target: str | None = None
    reached: float | None = None
    """The target metric's value."""
    met: bool | None = None


def check(workdir: pathlib.Path, new: Experiment, fingerprint: str) -> list[str]:
    """What a run continued in `workdir` changes, as lines for its log; creates nothing.

    Raises UserError, naming the field, where a change would make it another run, and where the
    folder holds something else than a run.
    """
    if not workdir.exists():
        return []
    if not workdir.is_dir():
        raise UserError(f"{workdir} is a file, not a run directory")
    if not (workdir / "config.json").exists():
        if {path.name for path in workdir.iterdir()} - {"environment.json"}:
            raise UserError(f"{workdir} is not empty and holds no config.json: not a run directory")
        return []
    saved = checkpoint.steps(workdir / "checkpoints")
    if not saved:  # nothing has been trained yet that a change could spoil
        return []
    before = experiments.completed(read(workdir, "config.json"), new)
    after = experiments.to_json(new)
    for path, (was, now) in experiments.refusals(before, after).items():
        field = experiments.plain(path)
        raise UserError(
            f"{workdir} was trained with {field} = {json.dumps(was)}, and this asks for "
            f"{json.dumps(now)}: give another --workdir, or the same {field}"
        )
    check_data(workdir, fingerprint)
    if max(saved) > new.steps:
        raise UserError(
            f"{workdir} is already at step {max(saved)}, past steps = {new.steps}: "
            "give another --workdir, or more steps"
        )
    changed = experiments.changes(before, after).items()
    return [
        f"continued with {experiments.plain(path)} = {now}, before {was}"
        for path, (was, now) in changed
    ]


def opening(workdir: pathlib.Path, e: Experiment, fingerprint: str) -> dict[str, Any]:
    """What is there, before anything is created, as JSON: one process asks it for all.

    news: what `check` gives; finished: a summary, where nothing is left to do; new: whether nothing
    is saved yet; asked: what every process must have been asked.
    """
    news = check(workdir, e, fingerprint)
    done = finished(workdir, e, news)
    return {
        "news": news,
        "finished": None if done is None else dataclasses.asdict(done),
        "new": not checkpoint.steps(workdir / "checkpoints"),
        "asked": asked(e, fingerprint),
    }


def asked(e: Experiment, fingerprint: str) -> dict[str, Any]:
    return {"data": fingerprint, "config": experiments.dumps(e)}


def check_data(workdir: pathlib.Path, fingerprint: str) -> None:
    """Raises UserError where a run was trained on other data."""
    trained_on = read(workdir, "environment.json")["data"]
    if trained_on != fingerprint:
        raise UserError(
            f"{workdir} was trained on data {trained_on[:12]}, and the data is now "
            f"{fingerprint[:12]}: the files, or the Python that ships them, have changed"
        )


def read(workdir: pathlib.Path, name: str) -> Any:
    """A JSON file of a run. Raises UserError where there is none, or it is broken."""
    path = workdir / name
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a run directory: it has no {name}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def write(workdir: pathlib.Path, name: str, text: str) -> None:
    """Replaces a file of a run in one step, so that no half of it is ever seen."""
    temporary = workdir / f".{name}.new"
    temporary.write_text(text)
    os.replace(temporary, workdir / name)


def write_json(workdir: pathlib.Path, name: str, value: Any) -> None:
    """Writes strict JSON, from the first process alone."""
    if hosts.me() == 0:
        write(workdir, name, json.dumps(value, indent=2, allow_nan=False) + "\n")


def start(
    workdir: pathlib.Path,
    experiment: Experiment,
    fingerprint: str,
    new: bool,
    files: Mapping[str, str] | None = None,
) -> str:
    """Writes what is known before the first step, and files by name: the data's own.

    new: nothing was saved here before. Returns when this was, which environment.json says too.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat()
    about = environment() | {"started": started, "seed": experiment.seed, "data": fingerprint}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {workdir}: {error.strerror}") from None
    # Of fewer steps, and of a run that ended before it saved anything.
    for stale in ("summary.json", "table.txt", *(["init_from.json"] if new else [])):
        (workdir / stale).unlink(missing_ok=True)
    write(workdir, "environment.json", json.dumps(about, indent=2) + "\n")
    write(workdir, "config.json", experiments.dumps(experiment))
    for name, text in (files or {}).items():
        write(workdir, name, text)
    return started


def check_shared(workdir: pathlib.Path, started: str, seconds: float = 60) -> None:
    """Raises UserError where this process does not see what the first one wrote at its `start`.

    seconds: how long a network's disk may show what was there before.
    """
    deadline = time.monotonic() + seconds
    path = workdir / "environment.json"
    while not (path.exists() and read(workdir, path.name).get("started") == started):
        if time.monotonic() > deadline:
            raise UserError(
                f"process {hosts.me()} does not see what process 0 wrote in {workdir}: "
                "give a --workdir on a disk that all processes share"
            )
        time.sleep(0.1)


def recorder(workdir: pathlib.Path, e: Experiment, step: int, flops: int, quiet: bool) -> Recorder:
    """The run's recorder, from a step on; rows of later steps, of a crash, are dropped."""
    first = hosts.me() == 0
    if first:
        record.truncate(workdir, step)
    return Recorder(
        workdir,
        total_steps=e.steps,
        start_step=step,
        tracker=e.tracker,
        name=workdir.name,
        config=experiments.to_json(e),
        flops_per_step=flops,
        quiet=quiet,
        enabled=first,
    )


def summary(workdir: pathlib.Path) -> Summary:
    """What a finished run left. Raises UserError where it has not finished."""
    read(workdir, "config.json")
    if not (workdir / "summary.json").exists():
        raise UserError(f"{workdir} has not finished: it has no summary.json")
    return Summary(**read(workdir, "summary.json"))


def evaluated(workdir: pathlib.Path, step: int) -> dict[str, dict[str, float]]:
    """The metrics, by split, of the evaluations that a run has already logged at a step."""
    rows = [row for row in record.read_metrics(workdir) if row["step"] == step]
    ours = {"step", "split", "seconds"}
    return {
        row["split"]: {k: v for k, v in row.items() if k not in ours}
        for row in rows
        if row["split"] != "train"
    }


def finished(workdir: pathlib.Path, e: Experiment, news: Sequence[str]) -> Summary | None:
    """The summary of a run that already has all its steps and evaluations, or None.

    news: what the experiment changes, for its log.
    """
    if not (workdir / "summary.json").exists():
        return None
    found = summary(workdir)
    done = found.step == e.steps or (found.early and e.early_stop.patience is not None)
    if not done or not set(e.final_splits) <= set(found.metrics):
        return None
    if news:
        write(workdir, "config.json", experiments.dumps(e))
        with (workdir / "log.txt").open("a") as log:
            log.writelines(f"{line}\n" for line in news)
    return finish(workdir, found, e.target)


def finish(workdir: pathlib.Path, found: Summary, target: Target | None) -> Summary:
    """Judges a run against its target, and writes its summary and table."""
    found = judge(found, target)
    write_json(workdir, "summary.json", dataclasses.asdict(found))
    if hosts.me() == 0:
        write(workdir, "table.txt", table([found]) + "\n")
    return found


def judge(found: Summary, target: Target | None) -> Summary:
    """The summary, judged against a target on metrics it already holds."""
    if target is None:
        return dataclasses.replace(found, target=None, reached=None, met=None)
    value = experiments.value(found.metrics, target.split, target.metric, "target.metric")
    return dataclasses.replace(found, target=str(target), reached=value, met=target.met(value))


def table(summaries: Sequence[Summary]) -> str:
    """Runs side by side, as text."""
    head = (
        "model",
        "parameters",
        "data",
        "target",
        "reached",
        "",
        "seconds",
        "steps/s",
        "FLOPs/step",
        "MFU",
    )
    return aligned([head, *map(_row, summaries)], left={0, 2, 3, 5})


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """A table, its first row the head, as text; columns are to the right but for those in left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def matrix(name: str, rows: Sequence[Sequence[int]]) -> str:
    """Counts by target (down) and prediction (across), as text."""
    cells = [["", *map(str, range(len(rows)))]]
    cells += [[str(i), *map(str, row)] for i, row in enumerate(rows)]
    width = max(len(cell) for row in cells for cell in row)
    lines = ["  ".join(cell.rjust(width) for cell in row) for row in cells]
    return "\n".join([f"{name.replace('_', ' ')}: target down, prediction across", *lines])


def best(workdir: pathlib.Path, step: int | None) -> int:
    """The step of a run's best checkpoint. Raises UserError where it kept none."""
    if step is None:
        raise UserError(f"{workdir} kept no best checkpoint: see early_stop.keep_best")
    return step


def _row(s: Summary) -> tuple[str, ...]:
    flops = f"{s.flops_per_step:.4g}" + (
        "" if s.flops_qualifier == "exact" else f" ({s.flops_qualifier})"
    )
    reached = "" if s.reached is None else f"{s.reached:.4f}"
    against = "" if s.mfu_of is None else s.mfu_of.split(",")[0]
    mfu = "unavailable" if s.mfu is None else f"{100 * s.mfu:.1f}% of {against}"
    verdict = "" if s.met is None else "met" if s.met else "MISSED"
    return (
        s.name,
        f"{s.parameters:,}",
        s.data,
        s.target or "none",
        reached,
        verdict,
        f"{s.seconds:.1f}",
        f"{s.steps_per_second:.4g}",
        flops,
        mfu,
    )
