"""What the ledger itself costs: seconds before a run's first step, microseconds at every step."""

import contextlib
import dataclasses
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

from research import compute, record, timing
from research.experiment import Experiment
from research.setup import prepare

SECONDS, SHARE = 0.5, 0.25
"""What a step's report may take: seconds, and as a share of compiling it."""
STEP = 0.02
"""Seconds of the step that metering is compared with."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds on a config's training step: once for lowering and compiling, medians else."""

    trace: float
    lower: float
    compile: float
    count: float
    """Of compute.count, on what was traced."""
    report: float
    """Of compute.report, which counts too, on what was traced and compiled: all that a run pays."""

    @property
    def share(self) -> float:
        return self.report / self.compile

    @property
    def within(self) -> bool:
        return self.report <= SECONDS and self.share <= SHARE


def cost(experiment: Experiment, rounds: int = 5) -> Cost:
    setup = prepare(experiment, jax.devices()[:1])
    example = setup.example()
    # A step of its own each time: jax keeps what it has traced of a function.
    trace, traced = _timed(lambda: setup.step().trace(*example), rounds)
    count, _ = _timed(lambda: compute.count(traced), rounds)
    with uncached():
        lower, lowered = _timed(traced.lower, 1)
        compile_, compiled = _timed(lowered.compile, 1)
    report, _ = _timed(lambda: compute.report(traced, compiled=compiled).json(), rounds)
    return Cost(trace=trace, lower=lower, compile=compile_, count=count, report=report)


def _timed(fn: Callable[[], T], rounds: int) -> tuple[float, T]:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Without jax's cache of compiled programs."""
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks for the flag once, at the first program
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def table(costs: dict[str, Cost]) -> str:
    lines = [f"{'seconds':20}{'trace':>8}{'lower':>8}{'compile':>9}{'count':>8}{'report':>9}"]
    lines[0] += f"{'of compile':>12}"
    for name, c in costs.items():
        row = f"{name:20}{c.trace:8.3f}{c.lower:8.3f}{c.compile:9.3f}{c.count:8.3f}{c.report:9.3f}"
        verdict = "within" if c.within else "over"
        lines.append(f"{row}{100 * c.share:11.1f}%  {verdict}")
    lines.append(f"\nallowed: {SECONDS} s, and {100 * SHARE:.0f}% of compiling")
    return "\n".join(lines)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def per_step(rounds: int = 5, steps: int = 50) -> float:
    """Seconds that train()'s loop spends a step on metering alone: its clock, and the bar with
    steps/s and FLOP/s on a terminal, redrawn five times a second.

    Of the loop's calls in isolation, between sleeps of STEP; the median over rounds of their mean.
    As if every step were reported, where `train` reports one in `log_every`, or in 0.1 s.
    """
    means = []
    with contextlib.redirect_stdout(_Terminal()), tempfile.TemporaryDirectory() as folder:
        log = record.Recorder(
            pathlib.Path(folder),
            total_steps=rounds * steps,
            name="",
            config={},
            flops_per_step=1e9,
        )
        with log:
            clock, step = timing.Clock(), 0
            for _ in range(rounds):
                spent = 0.0
                for _ in range(steps):
                    time.sleep(STEP)
                    step += 1
                    start = time.perf_counter()
                    if clock.since_lap > 0:
                        clock.lap()
                        log.progress(step, 1.0)
                    spent += time.perf_counter() - start
                means.append(spent / steps)
    return statistics.median(means)
