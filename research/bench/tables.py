"""A comparison as text for a terminal, and as CSV."""

import csv
import io
from collections.abc import Sequence

from research import run
from research.bench import words
from research.bench.comparison import Comparison
from research.bench.result import FIGURES, Figure

_NOTE = (
    "95%: of bootstrap draws of the rounds of both. * of the peak measured there, no datasheet "
    "having one. ~ estimated, < at most, > at least. --csv and --html say of every figure how it "
    "was got."
)


def text(c: Comparison) -> str:
    """The machines, their ratios over all models, a row for each model and machine, the plans."""
    parts = [_machines(c), _models(c)] if c.results else []
    parts += [_plans(c)] if c.plans else []
    first, *others = (run.aligned(rows, left={0, 1}) for rows in parts)
    left = {name: c.left_out(name) for name in c.results}
    notes = [f"{name}: without {', '.join(models)}" for name, models in left.items() if models]
    return "\n\n".join(["\n".join([first, *notes]), *others, _NOTE])


def _machines(c: Comparison) -> list[Sequence[str]]:
    fast = f"times as fast as {c.baseline}"
    rows: list[Sequence[str]] = [("machine", "device", "jax", "suite", "date", fast, "95%")]
    for name, result in c.results.items():
        overall = c.overall(name)
        rows.append(
            (
                name,
                result.machine.device,
                jax_of(c, name),
                str(result.suite),
                result.date[:10],
                words.times(overall),
                words.times_ends(overall),
            )
        )
    return rows


def jax_of(c: Comparison, machine: str) -> str:
    """The version of jax that a machine was measured with."""
    versions = c.results[machine].environment.get("versions")
    found = versions.get("jax") if isinstance(versions, dict) else None
    return str(found or "not said")


def mfu(c: Comparison, machine: str, model: str, name: str = "mfu") -> Figure:
    """Of the datasheet's peak where there is one, else of the measured one."""
    found = c.figure(machine, model, name)
    return found if found.value is not None else c.figure(machine, model, f"{name}_measured")


def _models(c: Comparison) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        (
            *("model", "machine", "step", "times", "95%", "examples/s", "MFU"),
            *("memory", "compile", "to target", "energy", "money"),
        )
    ]
    for model in c.models:
        for name in c.results:

            def cell(figure: str, name: str = name, model: str = model) -> str:
                return words.shown(figure, c.figure(name, model, figure))

            ratio, share = c.ratio(name, model), words.shown("mfu", mfu(c, name, model))
            rows.append(
                (
                    model,
                    name,
                    cell("step_seconds"),
                    words.times(ratio),
                    words.times_ends(ratio),
                    cell("examples_per_second"),
                    share + "*" * (c.figure(name, model, "mfu").value is None and share != "-"),
                    cell("memory"),
                    cell("compile_seconds"),
                    cell("target_seconds"),
                    cell("target_joules"),
                    cell("target_money"),
                )
            )
    return rows


def _plans(c: Comparison) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        (
            "planned",
            "target",
            "chips",
            "step",
            "from, to",
            "times",
            "examples/s",
            "MFU",
            "run",
            "USD",
        )
    ]
    rows += [
        (
            p.config,
            p.target,
            "-" if p.chips is None else str(p.chips),
            words.shown("step_seconds", p.step_seconds),
            words.ends("step_seconds", p.step_seconds),
            words.times(c.plan_ratio(p)),
            words.shown("examples_per_second", p.examples_per_second),
            words.shown("mfu", p.mfu),
            _plain(p.hours, " h"),
            _plain(p.money, ""),
        )
        for p in c.planned
    ]
    return rows


def _plain(f: Figure, unit: str) -> str:
    return "-" if f.value is None else words.marked(f, words.digits(f.value) + unit)


def to_csv(c: Comparison) -> str:
    """Every figure, one a line, with how it was got."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow("machine model figure value unit low high qualifier how".split())

    def write(machine: str, model: str, name: str, unit: str, f: Figure) -> None:
        value, low, high = ("" if x is None else repr(x) for x in (f.value, f.low, f.high))
        writer.writerow((machine, model, name, value, unit, low, high, f.qualifier, f.how))

    ratio = "times_as_fast", f"of {c.baseline}"
    for machine in c.results:
        write(machine, "all", *ratio, c.overall(machine))
        for model in c.models:
            write(machine, model, *ratio, c.ratio(machine, model))
            for name, kind in FIGURES.items():
                write(machine, model, name, kind.unit, c.figure(machine, model, name))
    for p in c.planned:
        write(p.target, p.config, *ratio, c.plan_ratio(p))
        write(p.target, p.config, "step_seconds", "s", p.step_seconds)
        write(p.target, p.config, "examples_per_second", "1/s", p.examples_per_second)
        write(p.target, p.config, "mfu", "share", p.mfu)
        for name, unit, f in (
            ("run", "h", p.hours),
            ("run", "kWh", p.kwh),
            ("run", "USD", p.money),
        ):
            write(p.target, p.config, name, unit, f)
    return out.getvalue()
