"""Measurements of several machines, and plans for others, put beside a baseline."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research import UserError
from research import experiment as experiments
from research.bench import plans
from research.bench import result as results
from research.bench.plans import Planned
from research.bench.result import Figure, Result, Row, unavailable

DRAWS = 2000
"""Of a bootstrap."""
_LINE = 240
"""Characters that are told of a mistake in a file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    results: Mapping[str, Result]
    """By the machine's name: its file's."""
    plans: Mapping[str, Sequence[Planned]]
    """By the name of the plan's file."""
    baseline: str
    """One of the results' names; empty: there are plans alone."""
    warnings: Sequence[str]

    @property
    def models(self) -> list[str]:
        """In the order of the files."""
        return list(dict.fromkeys(row.name for r in self.results.values() for row in r.rows))

    @property
    def planned(self) -> list[Planned]:
        return [each for of_file in self.plans.values() for each in of_file]

    def row(self, machine: str, model: str) -> Row | None:
        return self.results[machine].row(model)

    def figure(self, machine: str, model: str, name: str) -> Figure:
        row = self.row(machine, model)
        if row is None:
            return unavailable("not measured there")
        return unavailable(row.failed) if row.failed else row.figures[name]

    def ratio(self, machine: str, model: str) -> Figure:
        """How many times as fast as the baseline a machine makes a model's step.

        Of the medians of the rounds; the interval is of a bootstrap over the rounds of both (Efron
        and Tibshirani 1993, percentiles). It holds the scatter within each measurement alone, not
        how a machine differs from day to day.
        """
        drawn, reason = self._drawn(machine, model)
        if drawn is None:
            return unavailable(reason)
        if machine == self.baseline:
            return _SELF
        return _ratio(drawn, "the baseline's median step over this one's")

    def overall(self, machine: str) -> Figure:
        """The geometric mean of the ratios of all models that both have."""
        every = {model: self._drawn(machine, model)[0] for model in self.models}
        drawn = {model: found for model, found in every.items() if found is not None}
        if not drawn:
            return unavailable("no model has a time on both machines")
        if machine == self.baseline:
            return _SELF
        mean = np.exp(np.mean([np.log(found) for found in drawn.values()], axis=0))
        left = self.left_out(machine)
        how = f"geometric mean over {', '.join(drawn)}"
        return _ratio(mean, how + (f"; without {', '.join(left)}" if left else ""))

    def left_out(self, machine: str) -> list[str]:
        """Models without a ratio."""
        return [model for model in self.models if self._drawn(machine, model)[0] is None]

    def _drawn(self, machine: str, model: str) -> tuple[np.ndarray | None, str]:
        """Ratios, first of the rounds as measured and then of draws from them; or why not."""
        ours, theirs = self.row(self.baseline, model), self.row(machine, model)
        for name, row in ((self.baseline, ours), (machine, theirs)):
            figure = self.figure(name, model, "step_seconds")
            if row is None or figure.value is None:
                return None, f"{name}: {figure.how}"
        assert ours is not None
        assert theirs is not None
        work = [row.figures["model_flops"].value for row in (ours, theirs)]
        if work[0] != work[1]:
            return (
                None,
                f"not the same work: {work[1]:,.0f} model FLOPs, the baseline {work[0]:,.0f}",
            )
        rng = np.random.default_rng(0)
        medians = []
        for row in (ours, theirs):
            rounds = np.array(row.rounds)
            draws = np.median(rng.choice(rounds, size=(DRAWS, len(rounds))), axis=1)
            medians.append(np.concatenate([[np.median(rounds)], draws]))
        return medians[0] / medians[1], ""

    def plan_ratio(self, planned: Planned) -> Figure:
        """The same of a plan, where the baseline has measured as many model FLOPs a step."""
        step = planned.step_seconds
        if step.value is None:
            return unavailable(step.how)
        row = self.matching(planned)
        if row is None:
            return unavailable("no step of as many model FLOPs was measured for a baseline")
        ours = row.figures["step_seconds"]
        if ours.value is None:
            return ours
        low, high = (ours.value / x if x else None for x in (step.high, step.low))
        return Figure(
            value=ours.value / step.value,
            qualifier="estimated",
            how=f"the baseline's median step of {row.name}, of as many model FLOPs, over the "
            "planned one; interval: the plan's",
            low=low,
            high=high,
        )

    def matching(self, planned: Planned) -> Row | None:
        """What the baseline has measured of the work that is planned."""
        if not self.baseline:
            return None
        alike = [
            row
            for row in self.results[self.baseline].rows
            if not row.failed and row.figures["model_flops"].value == planned.model_flops
        ]
        named = [row for row in alike if pathlib.Path(row.config).stem == planned.config]
        return next(iter([*named, *alike]), None)


_SELF = Figure(value=1.0, qualifier="exact", how="the baseline itself")


def _ratio(drawn: np.ndarray, what: str) -> Figure:
    value = float(drawn[0])
    low, high = np.percentile(drawn[1:], (2.5, 97.5))
    return Figure(
        value=value,
        qualifier="measured",
        how=f"{what}; interval: 95% of {DRAWS:,} bootstrap draws of the rounds of both",
        low=min(float(low), value),
        high=max(float(high), value),
    )


def read(paths: Sequence[pathlib.Path], baseline: str | None = None) -> Comparison:
    """Files of the suite and of plans. A file that cannot be used becomes a warning.

    Raises UserError where no file has a measurement or a plan, or no measurement is called
    `baseline`.
    """
    found: dict[str, Result] = {}
    planned: dict[str, Sequence[Planned]] = {}
    warnings: list[str] = []
    for path in dict.fromkeys(paths):
        stems = [other.stem for other in dict.fromkeys(paths)]
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        try:
            data = results.read(path)
            if plans.is_plan(data):
                planned[name] = _named(path, plans.from_json, data)
            else:
                found[name] = _named(path, results.from_json, data)
        except UserError as error:
            line = str(error)
            warnings.append(line if len(line) < _LINE else f"{line[:_LINE]} ...")
    if not found and not planned:
        raise UserError("; ".join([*warnings, "no file has a measurement, or a plan, to compare"]))
    if baseline is not None and baseline not in found:
        raise UserError(
            f"--baseline {baseline!r} is no measurement"
            f"{experiments.did_you_mean(baseline, list(found))}"
        )
    baseline = baseline or next(iter(found), "")
    warnings += [*_told(planned), *(_differences(found, baseline) if found else ())]
    return Comparison(results=found, plans=planned, baseline=baseline, warnings=warnings)


def of_plan(data: Any) -> Comparison:
    """A plan by itself, as scripts/plan.py --json writes it."""
    planned = {str(data["config"]): plans.from_json(data)}
    return Comparison(results={}, plans=planned, baseline="", warnings=_told(planned))


def _told(planned: Mapping[str, Sequence[Planned]]) -> list[str]:
    """Warnings of plans, each once."""
    return list(
        dict.fromkeys(line for each in planned.values() for p in each for line in p.warnings)
    )


def _named(path: pathlib.Path, decode: Any, data: Any) -> Any:
    try:
        return decode(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _differences(found: Mapping[str, Result], baseline: str) -> list[str]:
    """What makes measurements less comparable than they look."""
    warnings, ours = [], found[baseline]
    for name, result in found.items():
        if result.suite != results.VERSION:
            warnings.append(
                f"{name} is of version {result.suite} of the suite, which is now "
                f"{results.VERSION}: its figures may not mean the same"
            )
        warnings += [
            f"{name}: {row.name} failed: {row.failed}" for row in result.rows if row.failed
        ]
        if name == baseline:
            continue
        for row in result.rows:
            other = ours.row(row.name)
            if other is None or row.failed or other.failed:
                continue
            changed = experiments.changes(other.experiment, row.experiment)
            if changed:
                fields = ", ".join(experiments.plain(field) for field in changed)
                warnings.append(
                    f"{row.name} has other settings on {name} than {baseline}: {fields}"
                )
            if row.data != other.data:
                warnings.append(
                    f"{row.name} was trained on other data on {name} than on {baseline}: times to "
                    "the target are of different tasks"
                )
    return warnings
