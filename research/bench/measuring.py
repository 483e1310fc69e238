"""One family on one device: its times, their scatter, and all that follows from them."""

import dataclasses
import itertools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research import compute, record, train
from research import experiment as experiments
from research.bench import counters, loop, metering, reading
from research.bench import result as results
from research.bench.families import Family
from research.bench.others import Others
from research.bench.result import Figure, Qualifier, Row, unavailable
from research.compute import chips, energy, peaks, roofline
from research.compute.report import program_json
from research.experiment import Experiment
from research.setup import Setup, prepare

NOISE = 0.10
"""The interquartile range of rounds over their median above which a machine is too noisy."""
OTHERS = 0.05
"""The share of a CPU's time, taken by other programs, above which it is."""
WARM = 1.0
"""Seconds of steps before any is timed, 3 at least."""
ROUND = 0.1
"""Seconds that a round lasts at least."""
ROUNDS, SINGLES = 8, 20
"""The least number of rounds, and of steps timed one by one."""
TRIES = 3
"""Times that a family's steps are timed at most: again where the machine was too noisy."""
RUNS, RUN = 5, 3.0
"""Runs to the target, at most; no more are made once they took so many seconds of steps."""
DRAWS = 2000
"""Of a bootstrap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A device and how long it is timed: what all rows share."""

    device: jax.Device
    seconds: float
    price: float | None
    datasheet: roofline.Rates | None
    measured: roofline.Rates
    counters: tuple[counters.Counters | None, str]

    def row(self, name: str, family: Family) -> Row:
        """A family's row; where it cannot be measured, one that says why."""
        row = Row(
            name=name,
            config=family.config,
            experiment={},
            data="",
            target=str(family.target),
            intensity=None,
            binds="",
            rounds=(),
            figures={},
        )
        try:
            e = family.experiment()
            row = dataclasses.replace(row, experiment=experiments.to_json(e))
            return self._measured(row, e)
        except (RuntimeError, ValueError, ArithmeticError, OSError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            return dataclasses.replace(row, failed=lines[0])

    def _measured(self, row: Row, e: Experiment) -> Row:
        setup, step, report, found = self._started(e)
        once = _warm(setup, step)
        chunk = max(1, math.ceil(ROUND / once))
        tried, noisy = 0, None
        while not tried or (noisy and tried < TRIES):
            tried += 1
            others = Others()
            rounds = _timed(setup, step, chunk, self.seconds, ROUNDS)
            singles = rounds if chunk == 1 else _timed(setup, step, 1, self.seconds / 4, SINGLES)
            apart, taken = spread(rounds), others.share()
            noisy = self.noisy(apart, taken)
        if noisy:
            noisy = dataclasses.replace(noisy, how=f"{noisy.how}; timed {tried} times")
        middle = statistics.median(rounds)
        report = report.after(middle)
        how = f"median of {len(rounds)} rounds of {chunk} steps; interval: 95% of its bootstrap"
        if tried > 1:
            how += f"; timed {tried} times, for it was too noisy before"
        found["memory_peak"] = _figure(
            report.peak_bytes,
            "upper bound",
            "since this process started, earlier rows included",
            f"{self.device.platform} does not tell",
        )
        low, high = interval(rounds)
        found["others"] = _figure(
            taken, "measured", "while steps were timed, by /proc/stat", "the system does not tell"
        )
        found["spread"] = _figure(apart, "measured", f"of {len(rounds)} rounds of {chunk} steps")
        timed = {
            "step_seconds": Figure(value=middle, qualifier="measured", how=how, low=low, high=high),
            "examples_per_second": Figure(
                value=setup.batch_size / middle,
                qualifier="measured",
                how=f"batch of {setup.batch_size} over step_seconds",
                low=setup.batch_size / high,
                high=setup.batch_size / low,
            ),
            "step_p50": _figure(float(np.median(singles)), "measured", f"of {len(singles)} steps"),
            "step_p95": _figure(
                float(np.percentile(singles, 95)), "measured", f"of {len(singles)} steps"
            ),
            **self._utilization(report),
            "joules_per_step": self._energy(setup, step, middle),
        }
        # What is unavailable anyway keeps its own reason.
        found |= {k: noisy if noisy and f.value is not None else f for k, f in timed.items()}
        wait = reading.of_step(setup, step, self.seconds)
        found["input_wait"] = Figure(
            value=wait.waiting,
            qualifier="measured",
            how=f"{wait.rounds} rounds with and without the making of batches, in turn; interval: "
            "twice the standard error; below 0 is noise",
            low=max(-1.0, wait.waiting - 2 * wait.error),
            high=min(1.0, wait.waiting + 2 * wait.error),
        )
        found |= self._target(setup, found["joules_per_step"])
        bounds = roofline.roofline(report.program, self.measured) if report.program else None
        return dataclasses.replace(
            row,
            data=setup.fingerprint,
            intensity=bounds.intensity if bounds else None,
            binds=bounds.binds if bounds else "",
            rounds=tuple(rounds),
            figures={name: found[name] for name in results.FIGURES},
        )

    def noisy(self, apart: float, taken: float | None) -> Figure | None:
        """What stands for every time where rounds are too far apart, or, where a CPU is measured,
        others have taken too much of it."""
        if apart > NOISE:
            return unavailable(
                f"too noisy: the middle half of the rounds is {100 * apart:.0f}% of their median "
                f"wide, and {100 * NOISE:.0f}% is borne"
            )
        if self.device.platform == "cpu" and taken is not None and taken > OTHERS:
            return unavailable(
                f"too noisy: other programs took {100 * taken:.0f}% of the CPU meanwhile, and "
                f"{100 * OTHERS:.0f}% is borne"
            )
        return None

    def _started(self, e: Experiment) -> tuple[Setup, Any, compute.Report, dict[str, Figure]]:
        """An experiment's setup and compiled step, its ledger, and the figures of starting it."""
        with metering.uncached():
            start = time.perf_counter()
            setup = prepare(e, [self.device])
            traced = setup.step().trace(*setup.example())
            compiling = time.perf_counter()
            step = traced.lower().compile()
            compiled = time.perf_counter()
            batch = next(iter(setup.feed(0, 1)))
            jax.block_until_ready(step(setup.initial(), batch, setup.root))
            first = time.perf_counter()
        report = compute.report(traced, compiled=step, mesh=setup.mesh, reference=setup.reference())
        count, program = report.count, report.program
        counted: Any = count.qualifier
        assert program is not None  # it was compiled
        executed: Qualifier = program_json(program)["qualifier"]
        memory = program.memory
        return (
            setup,
            step,
            report,
            {
                "parameters": _figure(setup.parameters, "exact", "counted"),
                "model_flops": _figure(
                    count.model_flops,
                    counted,
                    "of the traced step, recomputation left out, attention dense",
                ),
                "executed_flops": _figure(
                    program.matmul_flops, executed, "of the compiled program, loops by their trips"
                ),
                "moved_bytes": _figure(
                    program.bytes_by_space.get(0, 0) or None,
                    "estimated",
                    "at the boundaries of fusions; caches may spare some",
                ),
                "memory": _figure(
                    memory.total if memory else None,
                    "estimated",
                    "by the compiler's account",
                    "the compiler does not tell",
                ),
                "compile_seconds": _figure(
                    compiled - compiling, "measured", "once, jax's cache of programs left out"
                ),
                "first_step_seconds": _figure(
                    first - start,
                    "measured",
                    "once: reading the data, tracing, compiling, the initial state and a step; "
                    "the start of Python and of the device left out",
                ),
            },
        )

    def _utilization(self, report: compute.Report) -> dict[str, Figure]:
        found = {}
        for suffix, rates in (("", self.datasheet), ("_measured", self.measured)):
            asked: dict[str, Any] = report.utilization(rates)
            if not suffix and rates is None:
                nothing = roofline.Figure(None, f"no datasheet is known for {self.device_name}")
                asked = dict.fromkeys(asked, nothing)
            of = f", {rates.device}, {rates.source}" if rates else ""
            for name, key, words in (
                ("mfu", "MFU", "model FLOPs, attention dense"),
                ("mfu_causal", "MFU, causal attention halved", "causal attention halved"),
                ("hfu", "HFU", "executed FLOPs"),
            ):
                if key not in asked:
                    found[name + suffix] = unavailable("no product is masked causally")
                    continue
                how = f"{words} / (step_seconds x 1 device x peak of the precision{of})"
                found[name + suffix] = _figure(asked[key].value, "measured", how, asked[key].reason)
        return found

    @property
    def device_name(self) -> str:
        return peaks.name_of(self.device)

    @property
    def chip(self) -> chips.Chip | None:
        return chips.match(self.device.device_kind, self.device.platform)

    def _energy(self, setup: Setup, step: Any, seconds: float) -> Figure:
        """By counters, or else by the board's power."""
        meter, reason = self.counters
        if meter is not None:
            joules, how = meter.joules_per_step(_lasting(setup, step, seconds))
            return _figure(joules, "measured", how, how)
        chip = self.chip
        if chip is None or chip.power_watts is None:
            return unavailable(f"{reason}; and no board power is published for this device")
        how = f"board power of {chip.name}, {chip.power_watts:g} W, x step_seconds ({reason})"
        return _figure(chip.power_watts * seconds, "estimated", how)

    def _target(self, setup: Setup, joules: Figure) -> dict[str, Figure]:
        """What it takes to the first evaluation that meets the target."""
        names = [name for name in results.FIGURES if name.startswith("target_")]
        e = setup.experiment
        target = e.target
        assert target is not None  # every family has one
        runs: list[list[dict[str, Any]]] = []
        others = Others()
        while not runs or (len(runs) < RUNS and sum(r[-1]["seconds"] for r in runs) < RUN):
            runs.append(_trained(setup))
        share = others.share()
        evaluated = [[row for row in rows if row["split"] == target.split] for rows in runs]
        met = [next((r for r in rows if target.met(r[target.metric])), None) for rows in evaluated]
        if met[0] is None:
            best = max if target.goal == "max" else min
            reached = best(row[target.metric] for row in evaluated[0])
            reason = f"{target} was not met in {e.steps} steps: {reached:.4g}"
            return dict.fromkeys(names, unavailable(reason))
        # A seed decides the steps: all runs take as many.
        steps, times = int(met[0]["step"]), [row["seconds"] for row in met if row]
        how = f"{target}, evaluated every {e.eval_every} steps, seed {e.seed}"
        many = len(times) > 2
        apart = spread(times) if many else spread(_laps(runs[0]))
        taken = self.noisy(apart, share) or Figure(
            value=statistics.median(times),
            qualifier="measured",
            how=f"{how}; median of {len(times)} runs; compiling, evaluating and saving left out"
            + ("; interval: least to greatest" if many else ""),
            low=min(times) if many else None,
            high=max(times) if many else None,
        )
        if joules.value is None:
            energy = joules
        else:
            by = f"target_steps x joules_per_step: {joules.how}"
            energy = _figure(joules.value * steps, "estimated", by)
        return {
            "target_reached": _figure(float(met[0][target.metric]), "measured", how),
            "target_steps": _figure(steps, "measured", how),
            "target_seconds": taken,
            "target_joules": energy,
            "target_money": self._money(taken),
        }

    def _money(self, seconds: Figure) -> Figure:
        """Of a machine rented for just so long."""
        if seconds.value is None:
            return seconds
        if self.price is not None:
            how = f"target_seconds at {self.price:g} USD an hour, as given"
            return _figure(self.price * seconds.value / 3600, "estimated", how)
        if self.chip is None:
            return unavailable("no price was given: --price takes the machine's USD an hour")
        cost = energy.cost(self.chip.key, 1, seconds.value)
        how = "; ".join([f"target_seconds at {cost.money.basis}", *cost.warnings])
        return _figure(cost.money.value, "estimated", how, cost.money.basis)


def _trained(setup: Setup) -> list[dict[str, Any]]:
    """What a run logs."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        train.train(setup, workdir, quiet=True)
        return record.read_metrics(workdir)


def _figure(value: float | None, qualifier: Qualifier, how: str, reason: str = "") -> Figure:
    if value is None:
        return unavailable(reason or how)
    return Figure(value=value, qualifier=qualifier, how=how)


def _warm(setup: Setup, step: Any) -> float:
    """Seconds of a step, after steps that are not counted."""
    start = time.perf_counter()
    for n, once in enumerate(loop.chunks(setup, step, 1), 1):
        if n >= 3 and time.perf_counter() - start > WARM:
            return once
    raise AssertionError("chunks are without end")


def _timed(setup: Setup, step: Any, chunk: int, seconds: float, least: int) -> list[float]:
    """Seconds of a step, by rounds of `chunk`, for so many seconds."""
    found: list[float] = []
    for each in loop.chunks(setup, step, chunk):
        found.append(each)
        if len(found) >= least and sum(found) * chunk >= seconds:
            break
    return found


def _lasting(setup: Setup, step: Any, seconds: float) -> Callable[[float], int]:
    """What makes steps for so many seconds and returns their number. seconds: of a step, about."""
    chunk = max(1, math.ceil(ROUND / seconds))
    running = loop.chunks(setup, step, chunk)
    next(running)  # the initial state is made, which is no step's energy

    def steps(window: float) -> int:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < window:
            next(running)
            count += chunk
        return count

    return steps


def spread(times: Sequence[float]) -> float:
    """The interquartile range over the median."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return float((high - low) / middle)


def interval(times: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median, by a bootstrap over rounds (Efron 1979, percentiles)."""
    drawn = np.random.default_rng(0).choice(times, size=(DRAWS, len(times)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    middle = statistics.median(times)
    return min(float(low), middle), max(float(high), middle)


def _laps(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds of a step, between logged rows of training."""
    logged = [(row["step"], row["seconds"]) for row in rows if row["split"] == "train"]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise([(0, 0.0), *logged])]
