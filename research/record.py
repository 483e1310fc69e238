"""Metrics of a training run, written to its run directory, the terminal and a tracker.

Files: `metrics.jsonl` (every row), `log.txt` (messages), `tensorboard/` (event files) and
`tracker.json` (the tracker's run id).
"""

import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from research import UserError

Tracker = Literal["wandb", "trackio"]
_RESERVED = ("step", "split", "seconds")


def require(tracker: Tracker | None) -> None:
    """Raises UserError, naming the extra to install, where a tracker's package is missing."""
    # Not imported here, for trackio reads its settings when it is; already imported, it is here.
    found = tracker is None or hasattr(sys.modules.get(tracker), "init")
    if not found and tracker not in sys.modules:
        spec = importlib.util.find_spec(str(tracker))
        # A mere directory of that name, as wandb leaves behind, is found too, without an origin.
        found = spec is not None and spec.origin is not None
    if not found:
        raise UserError(f"tracker {tracker!r} is not installed: pip install 'ergon[{tracker}]'")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`, oldest first.

    A last line cut short by a killed process is ignored. Raises ValueError, naming file and
    line, for any other broken line, and FileNotFoundError when there is no file.
    """
    path = Path(workdir) / "metrics.jsonl"
    *lines, tail = path.read_text("utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_parse(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a metrics row: {error}") from None
    with contextlib.suppress(ValueError):
        rows.append(_parse(tail))
    return rows


def truncate(workdir: Path, step: int) -> None:
    """Drop the rows of `metrics.jsonl` after `step`, atomically; no file is no error.

    TensorBoard files stay as they are: a Recorder with `start_step=step` writes the restart
    mark at which TensorBoard discards later steps. Raises ValueError as read_metrics does.
    """
    if (Path(workdir) / "metrics.jsonl").exists():
        _rewrite(workdir, [row for row in read_metrics(workdir) if row["step"] <= step])


class Recorder:
    """Writes rows, messages and progress of one run; a context manager.

    Args:
        workdir: Run directory, created if missing.
        total_steps: Steps in the whole run, for the bar and its ETA.
        start_step: Steps already done; when resuming, call `truncate(workdir, start_step)` first.
        tracker: Also send rows to this tracker. Offline unless WANDB_MODE says otherwise
            (wandb) or a TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set (trackio). A run directory
            that has been tracked before continues the same tracker run.
        name: Run name shown by the tracker.
        config: Configuration shown by the tracker.
        flops_per_step: Floating-point operations of one step; adds FLOP/s to the bar.
        quiet: Print nothing; files and tracker are still written.
        enabled: False makes every method a no-op (processes other than the first).

    Raises UserError for an unknown tracker, one whose package is missing, or a broken
    `metrics.jsonl`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        tracker: Tracker | None = None,
        name: str,
        config: dict[str, Any],
        flops_per_step: float | None = None,
        quiet: bool = False,
        enabled: bool = True,
    ) -> None:
        self._enabled, self._quiet, self._total = enabled, quiet, total_steps
        self._bar: _Bar | None = None
        self._tracked: _Run | None = None
        self._started = False
        if not enabled:
            return
        self._workdir = workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        # The previous row gives the first plain line its steps/s.
        self._last_step, self._last_seconds = 0, 0.0
        if (workdir / "metrics.jsonl").exists():
            rows = read_metrics(workdir)
            # Appending to a line that was cut short would break the file.
            _rewrite(workdir, rows)
            for row in rows:
                self._last_step, self._last_seconds = row["step"], row.get("seconds", 0.0)
        if tracker:
            self._tracked = _Run(tracker, workdir, name, config, quiet)
        self._rows = (workdir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        # Here, for where PyTorch is installed it takes a second to import that.
        from tensorboardX import SummaryWriter

        events = workdir / "tensorboard"
        self._events = SummaryWriter(
            str(events),
            purge_step=start_step + 1 if events.exists() else None,
            flush_secs=5,
            # Event files are named by the second: a quick restart would overwrite one, and
            # TensorBoard reads them in the order of their names.
            filename_suffix=f".{time.time_ns()}",
        )
        if not quiet and sys.stdout.isatty():
            self._bar = _Bar(
                total=total_steps,
                initial=start_step,
                file=sys.stdout,
                mininterval=0.2,
                miniters=1,
                dynamic_ncols=True,
                bar_format="step {n}/{total} |{bar}| loss {loss}  {speed}  ETA {remaining}{flops}",
            )
            self._bar.flops_per_step = flops_per_step

    def write(self, step: int, split: str, metrics: Mapping[str, float], seconds: float) -> None:
        """Record one row, and print it with steps/s since the previous row; on a terminal only
        rows of evaluations, for the bar shows training.

        Args:
            step: Steps done.
            split: Where the metrics come from: "train", "validation", ...
            metrics: Finite numbers by name.
            seconds: Duration of the run up to this row, earlier sessions included.

        Raises FloatingPointError for a NaN or infinite value, and ValueError for a metric called
        "step", "split" or "seconds".
        """
        if not self._enabled:
            return
        step, seconds = int(step), float(seconds)
        values = {metric: float(value) for metric, value in metrics.items()}
        for metric in values:
            if metric in _RESERVED:
                raise ValueError(f"step {step}, {split}: a metric cannot be called {metric!r}")
        for metric, value in {**values, "seconds": seconds}.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {step}, {split}: {metric} is {value}, not a finite number"
                )
        row = {"step": step, "split": split, **values, "seconds": seconds}
        self._rows.write(json.dumps(row, allow_nan=False) + "\n")
        scalars = {f"{split}/{metric}": value for metric, value in values.items()}
        for tag, value in scalars.items():
            self._events.add_scalar(tag, value, step)
        if self._tracked:
            self._tracked.log(scalars, step)
        steps, elapsed = step - self._last_step, seconds - self._last_seconds
        self._last_step, self._last_seconds = step, seconds
        # The bar shows training; an evaluation stays on the screen as a line above it.
        if not self._quiet and (self._bar is None or split != "train"):
            shown = [f"step {step}/{self._total}", split]
            shown += [f"{metric} {value:.4g}" for metric, value in values.items()]
            shown += [f"{steps / elapsed:.4g} steps/s"] if steps > 0 and elapsed > 0 else []
            self._print("  ".join(shown))

    def progress(self, step: int, loss: float) -> None:
        """Show `step` and `loss`, which may be NaN, on the terminal's bar; elsewhere do nothing.

        steps/s counts the time between calls, so compilation before the first one is left out.
        `loss` becomes a number only when the bar is redrawn, at most five times a second: one
        that is still on an accelerator is waited for only then.
        """
        if self._bar is None:
            return
        self._bar.loss = loss
        if self._started:
            self._bar.update(step - self._bar.n)
        else:
            self._started = True
            self._bar.unpause()
            self._bar.initial = self._bar.n = self._bar.last_print_n = step
            self._bar.refresh()

    def message(self, text: str) -> None:
        """Print `text` on its own line, above the bar, and append it to `log.txt`."""
        if not self._enabled:
            return
        with (self._workdir / "log.txt").open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        if not self._quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything; `failed` marks the tracker's run. May be called twice."""
        if not self._enabled:
            return
        self._enabled = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._rows.close()
        self._events.close()
        if self._tracked:
            self._tracked.finish(failed)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


class _Bar(tqdm):
    monitor_interval = 0  # no thread: it only serves bars that skip updates
    loss: Any = None
    flops_per_step: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        shown = super().format_dict
        rate = shown["rate"]
        if rate is None and shown["elapsed"] > 0:
            rate = (shown["n"] - shown["initial"]) / shown["elapsed"]
        speed = f"{rate:.4g} steps/s" if rate else "? steps/s"
        flops = ""
        if self.flops_per_step:
            flops = f"  {_si(rate * self.flops_per_step) if rate else '? '}FLOP/s"
        loss = "?" if self.loss is None else f"{float(self.loss):.4g}"
        return {**shown, "speed": speed, "flops": flops, "loss": loss}


def _si(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


def _parse(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not strict JSON")

    row = json.loads(line, parse_constant=refuse)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("expected an object with an integer 'step'")
    return row


def _rewrite(workdir: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    _replace(Path(workdir) / "metrics.jsonl", text)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


class _Run:
    """One run of wandb or trackio."""

    def __init__(
        self, tracker: Tracker, workdir: Path, name: str, config: dict[str, Any], quiet: bool
    ) -> None:
        if tracker not in get_args(Tracker):
            raise UserError(f"unknown tracker {tracker!r}; known: {', '.join(get_args(Tracker))}")
        if tracker == "trackio":  # which reads this once, when it is imported
            os.environ.setdefault("TRACKIO_DIR", str(workdir.resolve() / "trackio"))
        require(tracker)
        module: Any = importlib.import_module(tracker)
        state = workdir / "tracker.json"
        ids = json.loads(state.read_text("utf-8")) if state.exists() else {}
        known = ids.get(tracker)
        self._module, self._wandb, self._quiet = module, tracker == "wandb", quiet
        if self._wandb:
            mode = os.environ.get("WANDB_MODE", "offline")
            self._run = module.init(
                project="ergon",
                name=name,
                config=config,
                dir=str(workdir),
                mode=mode,
                id=known,
                resume="allow" if mode == "online" else None,
                settings=module.Settings(console="off", silent=quiet),
            )
            # wandb drops rows whose own step goes back, as after a crash.
            self._run.define_metric("*", step_metric="step")
            ids[tracker] = self._run.id
        else:
            with self._hushed():
                # trackio resumes by name.
                self._run = module.init(
                    project="ergon",
                    name=known or name,
                    config=config,
                    resume="allow" if known else "never",
                )
            ids[tracker] = self._run.name
        _replace(state, json.dumps(ids) + "\n")

    def log(self, scalars: dict[str, float], step: int) -> None:
        if self._wandb:
            self._run.log({**scalars, "step": step})
        else:
            self._run.log(scalars, step)

    def finish(self, failed: bool) -> None:
        if self._wandb:
            self._run.finish(exit_code=int(failed))
        else:
            with self._hushed():
                self._module.finish()

    def _hushed(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.redirect_stdout(io.StringIO() if self._quiet else sys.stdout)
