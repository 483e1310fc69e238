"""Steps of real training runs, timed, and what a calibration makes of those it has not seen."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from research import UserError, command, compute
from research.compute import peaks, predict, roofline
from research.experiment import Experiment
from research.setup import prepare

OTHERS: Mapping[str, tuple[str, dict[str, dict[str, Any]], int]] = {
    "mlp 256": ("mlp_cancer", {"model": {"sizes": (256, 256, 1)}}, 256),
    "mlp 1024": ("mlp_cancer", {"model": {"sizes": (1024, 1024, 1)}}, 128),
    "mlp 2048": ("mlp_cancer", {"model": {"sizes": (2048, 2048, 2048, 1)}}, 341),
    "cnn 16": ("cnn_digits", {"model": {"channels": (16, 32), "dense": 64}}, 16),
    "cnn 48": ("cnn_digits", {"model": {"channels": (48, 96), "dense": 256}}, 128),
    "cnn 64": ("cnn_digits", {"model": {"channels": (64, 128), "dense": 64}}, 32),
    "cnn without dropout": ("diloco_digits", {"model": {"channels": (24, 24), "dense": 32}}, 96),
    "lenet": ("lenet_digits", {"model": {"padding": "SAME"}}, 256),
    "lenet small": ("lenet_digits", {"model": {"image": (16, 16, 1)}, "data": {"upscale": 2}}, 24),
    "resnet 16": ("resnet_digits", {"model": {"width": 16}}, 128),
    "resnet 32, deep": ("resnet_digits", {"model": {"width": 32, "layers": (2, 2)}}, 32),
    "resnet 48, large": (
        "resnet_digits",
        {"model": {"width": 48, "first_stride": 2}, "data": {"upscale": 4}},
        16,
    ),
    "vit 32": ("vit_digits", {"model": {"width": 32, "layers": 2}}, 128),
    "vit 128": ("vit_digits", {"model": {"width": 128, "layers": 4, "heads": 8}}, 32),
    "vit 96, long": (
        "vit_digits",
        {"model": {"width": 96, "layers": 1, "image": (32, 32, 1)}, "data": {"upscale": 4}},
        16,
    ),
    "gru 64": ("gru_text", {"model": {"width": 64, "layers": 1}, "data": {"length": 100}}, 16),
    "gru 384": ("gru_text", {"model": {"width": 384}, "data": {"length": 16}}, 64),
    "lstm 96": ("lstm_text", {"model": {"width": 96, "layers": 1}, "data": {"length": 32}}, 64),
    "lstm 160": ("lstm_text", {"model": {"width": 160, "layers": 3}, "data": {"length": 24}}, 16),
    "lstm 512": ("lstm_text", {"model": {"width": 512, "layers": 1}, "data": {"length": 20}}, 24),
    "transformer 64": (
        "transformer_text",
        {
            "model": {"context": 32, "layers": 2, "width": 64, "feed_forward": 172},
            "data": {"length": 32},
        },
        24,
    ),
    "transformer 256": (
        "transformer_text",
        {
            "model": {"context": 96, "layers": 2, "width": 256, "feed_forward": 688},
            "data": {"length": 96},
        },
        8,
    ),
    "transformer 192, gelu": (
        "transformer_text",
        {
            "model": {
                "context": 48,
                "layers": 3,
                "heads": 6,
                "width": 192,
                "mlp": "gelu_erf",
                "feed_forward": 768,
                "norm": "layer",
                "positions": "learned",
                "dropout": 0.0,
            },
            "data": {"length": 48},
        },
        16,
    ),
    "transformer 128, long": (
        "transformer_text",
        {
            "model": {"context": 384, "layers": 1, "width": 128, "feed_forward": 344},
            "data": {"length": 384},
        },
        4,
    ),
}
"""Programs to calibrate on: a config, what is changed in it, and the batch size. None is a
config's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of training on one device."""

    name: str
    program: compute.Program
    seconds: float
    """The least, of the rounds it was timed in, of medians over chunks of steps, each waited for:
    what else runs on a machine only ever slows a step down."""
    spread: float
    """The interquartile range of that round's chunks over their median."""
    rounds: tuple[float, ...]
    """The medians of all rounds; seconds."""


Make = Callable[[], Experiment]


def configs() -> dict[str, Make]:
    """Every config below the current folder; one whose data is not here raises UserError."""
    paths = (path for path in sorted(Path("configs").glob("*.py")) if path.stem != "__init__")
    return {path.stem: functools.partial(command.load, path) for path in paths}


def others() -> dict[str, Make]:
    """The programs of `OTHERS`."""
    return {name: functools.partial(_changed, *what) for name, what in OTHERS.items()}


def _changed(config: str, changes: Mapping[str, Mapping[str, Any]], batch_size: int) -> Experiment:
    base = command.load(Path("configs") / f"{config}.py")
    parts = {
        part: dataclasses.replace(getattr(base, part), **fields) for part, fields in changes.items()
    }
    return dataclasses.replace(base, **parts, batch_size=batch_size)


class Timer:
    """An experiment's compiled step, to be timed on the first device again and again; its batches
    are on the device. Raises UserError where its data is not here."""

    def __init__(self, name: str, experiment: Experiment) -> None:
        self._setup = prepare(experiment, jax.local_devices()[:1])
        self._step = self._setup.step().lower(*self._setup.example()).compile()
        self._state = self._setup.initial()
        self._batches = itertools.cycle(list(self._setup.feed(0, 4)))
        self._rounds: list[tuple[float, float]] = []
        self.name, self.program = name, compute.program(self._step)

    def round(self, seconds: float, chunks: int = 11) -> float:
        """Times `chunks` chunks of steps, 1 at least, that take about `seconds` together; the
        median of a step."""
        self._chunk(2)  # the first steps bring things where they belong
        count = max(1, round(seconds / chunks / self._chunk(1)))
        times = [self._chunk(count) for _ in range(chunks)]
        first, median, third = statistics.quantiles(times, n=4)
        self._rounds.append((median, (third - first) / median))
        return median

    def _chunk(self, count: int) -> float:
        """Seconds of one of `count` steps."""
        start = time.perf_counter()
        for batch in itertools.islice(self._batches, count):
            self._state, metrics = self._step(self._state, batch, self._setup.root)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - start) / count

    def step(self) -> Step:
        seconds, spread = min(self._rounds)
        return Step(
            name=self.name,
            program=self.program,
            seconds=seconds,
            spread=spread,
            rounds=tuple(median for median, _ in self._rounds),
        )


def measure(
    programs: Mapping[str, Make],
    seconds: float,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Step]:
    """Compiles programs and times all of them in turn, `rounds` times; one whose data is not here
    is left out. `say` is told what is at work."""
    if seconds <= 0 or rounds < 1:
        raise UserError(f"steps are timed in a round or more, not {rounds} of {seconds} seconds")
    timers = []
    for name, make in programs.items():
        try:
            timers.append(Timer(name, make()))
        except UserError as error:
            say(f"{name} is left out: {error}")
    for n in range(rounds):
        for timer in timers:
            took = timer.round(seconds)
            say(f"round {n + 1} of {rounds}, {timer.name}: {1e3 * took:.4g} ms")
    return [timer.step() for timer in timers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A step beside what was foretold of it by a calibration that has not seen it."""

    name: str
    measured: float
    """Seconds."""
    spread: float
    at_least: float
    """The roofline's lower bound, at measured peaks; seconds."""
    predicted: float
    low: float
    high: float
    parts: Mapping[str, float]

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def foretold(seen: Sequence[Step], unseen: Sequence[Step], rates: peaks.Peaks) -> list[Row]:
    """What a calibration on some programs says of others."""
    found = calibrated(seen, rates)
    return [_row(step, found) for step in unseen]


def left_out(steps: Sequence[Step], rates: peaks.Peaks) -> list[Row]:
    """What a calibration on all programs but one says of that one, for each."""
    others = ([*steps[:i], *steps[i + 1 :]] for i in range(len(steps)))
    return [_row(step, calibrated(rest, rates)) for step, rest in zip(steps, others, strict=True)]


def calibrated(steps: Sequence[Step], rates: peaks.Peaks) -> predict.Calibration:
    """Raises UserError where a calibration cannot be made of these."""
    try:
        return predict.calibrate([(step.program, step.seconds) for step in steps], rates)
    except ValueError as error:
        raise UserError(str(error)) from error


def _row(step: Step, calibration: predict.Calibration) -> Row:
    rates = roofline.of_peaks(calibration.peaks)
    found = predict.predict(step.program, rates, calibration)
    return Row(
        name=step.name,
        measured=step.seconds,
        spread=step.spread,
        at_least=found.at_least,
        predicted=found.seconds,
        low=found.low,
        high=found.high,
        parts=found.parts,
    )


def table(rows: Sequence[Row]) -> str:
    """Milliseconds; below, how well they agree."""
    lines = [
        f"{'ms a step':26}{'measured':>10}{'spread':>8}{'at least':>10}{'predicted':>11}"
        f"{'error':>8}   band"
    ]
    for row in rows:
        band = f"{1e3 * row.low:.4g} to {1e3 * row.high:.4g}"
        over = "  the bound is above the measurement" if row.at_least > row.measured else ""
        lines.append(
            f"{row.name:26}{1e3 * row.measured:10.4g}{row.spread:8.1%}{1e3 * row.at_least:10.4g}"
            f"{1e3 * row.predicted:11.4g}{row.error:+8.1%}   {band}{over}"
        )
    within = sum(row.low <= row.measured <= row.high for row in rows)
    median = statistics.median(abs(row.error) for row in rows)
    worst = max(rows, key=lambda row: abs(row.error))
    lines.append(
        f"\nmedian error {median:.1%}, worst {worst.error:+.1%} ({worst.name}); {within} of "
        f"{len(rows)} within the band; lower bound above the measurement: "
        f"{sum(row.at_least > row.measured for row in rows)}"
    )
    return "\n".join(lines)
