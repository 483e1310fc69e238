"""A comparison as one HTML page that asks for nothing else: page.html, filled."""

import datetime
import html
import json
import pathlib
import string
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from research.bench import drawing, tables, words
from research.bench.comparison import Comparison
from research.bench.result import FIGURES, Figure


class Cell(NamedTuple):
    """Of a table."""

    inside: str
    """HTML."""
    value: str
    """What it is sorted by: a number, or text; empty: last."""
    left: bool = False


def html_page(c: Comparison) -> str:
    """The whole file."""
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    names = [html.escape(name) for name in c.results or c.plans]
    title = " and ".join(names) if len(names) < 3 else f"{len(names)} machines"
    measured = (_overview, _speed, _target, _start, _rooflines, _plans, _machines, _meanings)
    sections = (_opening, _warnings, *(measured if c.results else (_plans,)))
    parts = [section(c) for section in sections]
    title += " compared" if c.results else " planned"
    return string.Template(template).substitute(title=title, body="\n".join(filter(None, parts)))


_NONE = "unavailable"


def figure(name: str, found: Figure, shown: str | None = None, ends: str | None = None) -> Cell:
    """A figure with its interval; how it was got is a hover, or a click, away."""
    if found.value is None:
        inside = _button(_NONE, f"unavailable: {found.how}")
        return Cell(inside, "")
    if shown is None:
        shown, ends = words.shown(name, found), words.ends(name, found)
    inside = _button(shown, f"{found.qualifier}: {found.how}", ends or "")
    return Cell(inside, repr(found.value))


def _button(shown: str, how: str, ends: str = "") -> str:
    kind = "figure none" if shown == _NONE else "figure"
    after = f'<span class="ends">{html.escape(ends)}</span>' if ends else ""
    found = html.escape(shown)
    return f'<button class="{kind}" title="{html.escape(how)}">{found}</button>{after}'


def text(inside: str) -> Cell:
    return Cell(html.escape(inside), html.escape(inside), left=True)


def table(name: str, heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[Cell]]) -> str:
    """heads: of columns, each with what it means."""
    rows = list(rows)
    left = [cell.left for cell in rows[0]] if rows else [False] * len(heads)
    top = "".join(
        f'<th role="columnheader" scope="col"{" class=left" * side}>'
        f'<button title="{html.escape(meaning)}">'
        f"{html.escape(head)}</button></th>"
        for (head, meaning), side in zip(heads, left, strict=True)
    )
    body = "\n".join(
        '<tr role="row">'
        + "".join(
            f'<td role="cell" data-label="{html.escape(head)}" data-value="{cell.value}"'
            f"{' class=left' * cell.left}>{'<span>' * bool(cell.inside)}{cell.inside}"
            f"{'</span>' * bool(cell.inside)}</td>"
            for (head, _), cell in zip(heads, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table role="table" aria-label="{html.escape(name)}">'
        f'<thead role="rowgroup"><tr role="row">{top}</tr></thead>'
        f'<tbody role="rowgroup">\n{body}\n</tbody></table></div>'
    )


def _ratio(found: Figure) -> Cell:
    return figure("", found, words.times(found), words.times_ends(found))


def _amount(found: Figure, unit: str) -> Cell:
    """A figure that is none of the suite's."""
    ends = ""
    if found.low is not None and found.high is not None:
        ends = f"{words.digits(found.low)} to {words.digits(found.high)}"
    shown = words.marked(found, f"{words.digits(found.value or 0)} {unit}")
    return figure("", found, shown, ends)


def _opening(c: Comparison) -> str:
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    baseline = f"Baseline: <b>{html.escape(c.baseline)}</b>. " if c.baseline else ""
    return (
        f'<p class="soft">{baseline}Written {day}. Point at a '
        "figure, or press it, for how it was got. ~ is an estimate, &lt; an upper and &gt; a lower "
        "bound; smaller figures are the ends of an interval. Heads of columns sort.</p>"
    )


def _warnings(c: Comparison) -> str:
    if not c.warnings:
        return ""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in c.warnings)
    return f'<ul class="warnings" aria-label="Warnings">{lines}</ul>'


def _overview(c: Comparison) -> str:
    fast = f"Times as fast as {c.baseline}"
    heads = [
        ("Machine", "the name of its file"),
        ("Device", "that was measured"),
        (fast, "geometric mean over the models"),
        ("float32", "products, the best rate measured, FLOP/s"),
        ("Memory", "bytes a second of main memory, measured"),
        ("jax", "version"),
        ("Date", "of measuring"),
    ]
    rows = []
    for name, result in c.results.items():
        measured = [roof for roof in result.roofs if roof.source.startswith("measured")]
        rates = [
            Figure(value=value, qualifier="measured", how=f"{roof.source}, one device")
            for roof in measured
            for value in (roof.flops, roof.bandwidth)
        ]
        cells = [Cell("", "")] * 2
        if rates:
            cells = [
                figure("", rate, f"{words.scaled(rate.value or 0)}{unit}")
                for rate, unit in zip(rates, ("FLOP/s", "B/s"), strict=False)
            ]
        rows.append(
            [
                text(name),
                text(result.machine.device),
                _ratio(c.overall(name)),
                *cells,
                text(tables.jax_of(c, name)),
                text(result.date[:10]),
            ]
        )
    found = drawing.drawings(c)
    svgs = [
        drawing.inline(found[name], f"{what}; the tables below hold the same figures")
        for name, what in (("speed", fast), ("target", "Seconds to the target"))
        if name in found
    ]
    drawn = f'<div class="drawings">{"".join(svgs)}</div>'
    return f"<h2>Machines</h2>\n{table('Machines', heads, rows)}\n{drawn}"


def _every(c: Comparison, cells: Callable[[str, str], Sequence[Cell]]) -> list[Sequence[Cell]]:
    return [
        [text(model), text(machine), *cells(machine, model)]
        for model in c.models
        for machine in c.results
    ]


_WHO = [("Model", "family of the suite"), ("Machine", "the name of its file")]


def _section(c: Comparison, title: str, about: str, columns: Sequence[tuple[str, str]]) -> str:
    """A table of figures. columns: heads, and figures' names; `mfu` and such are of the datasheet's
    peak where there is one."""
    rated = ("mfu", "mfu_causal", "hfu")

    def cells(machine: str, model: str) -> list[Cell]:
        found = []
        for _, name in columns:
            if name == "ratio":
                found.append(_ratio(c.ratio(machine, model)))
            elif name in ("target", "binds"):
                row = c.row(machine, model)
                found.append(text(getattr(row, name) if row else ""))
            elif name in rated:
                share = tables.mfu(c, machine, model, name)
                star = "*" * (c.figure(machine, model, name).value is None)
                found.append(figure(name, share, words.shown(name, share) + star))
            else:
                found.append(figure(name, c.figure(machine, model, name)))
        return found

    own = {
        "ratio": f"as fast as {c.baseline}",
        "target": "to be reached",
        "binds": "what takes longest by the roofline of the measured peaks",
    }
    heads = [(head, own.get(name) or FIGURES[name].words) for head, name in columns]
    made = table(title, [*_WHO, *heads], _every(c, cells))
    return f'<h2>{title}</h2>\n<p class="soft">{about}</p>\n{made}'


def _speed(c: Comparison) -> str:
    return _section(
        c,
        "Steps",
        f"Of one device, batches already on it; times as fast as {c.baseline}. MFU and HFU are "
        "shares of the datasheet's peak, or, where there is none, of the peak that was measured on "
        "the machine (*).",
        [
            ("Step", "step_seconds"),
            ("Times", "ratio"),
            ("p50", "step_p50"),
            ("p95", "step_p95"),
            ("Examples/s", "examples_per_second"),
            ("MFU", "mfu"),
            ("MFU, causal halved", "mfu_causal"),
            ("HFU", "hfu"),
            ("Input wait", "input_wait"),
            ("Spread", "spread"),
            ("Others", "others"),
        ],
    )


def _target(c: Comparison) -> str:
    return _section(
        c,
        "To a target",
        "Training until an evaluation first meets the target.",
        [
            ("Target", "target"),
            ("Time", "target_seconds"),
            ("Steps", "target_steps"),
            ("Reached", "target_reached"),
            ("Energy", "target_joules"),
            ("Energy a step", "joules_per_step"),
            ("Money", "target_money"),
        ],
    )


def _start(c: Comparison) -> str:
    return _section(
        c,
        "Start, work and memory",
        "What is paid before the first step, and what a step does and holds.",
        [
            ("Compile", "compile_seconds"),
            ("To first step", "first_step_seconds"),
            ("Parameters", "parameters"),
            ("Model FLOPs", "model_flops"),
            ("Executed", "executed_flops"),
            ("Moved", "moved_bytes"),
            ("Binds", "binds"),
            ("Memory", "memory"),
            ("Memory, peak", "memory_peak"),
        ],
    )


def _rooflines(c: Comparison) -> str:
    parts = []
    for name, found in drawing.drawings(c).items():
        if name.startswith("roofline_"):
            parts.append(drawing.inline(found, name.replace("_", " of ", 1)))
    if not parts:
        return ""
    return (
        "<h2>Rooflines</h2>\n"
        '<p class="soft">Products that a step executes a second, over the products a byte of main '
        "memory that it moves; lines are what the device can do.</p>\n"
        f'<div class="drawings">{"".join(parts)}</div>'
    )


def _plans(c: Comparison) -> str:
    if not c.plans:
        return ""
    heads = [
        ("Config", "that was planned"),
        ("Target", "hardware that need not be there"),
        ("Chips", "of it"),
        ("Step", "predicted"),
        ("Times", "as fast as the baseline, where it measured as many model FLOPs a step"),
        ("Examples/s", "predicted"),
        ("MFU", "at the predicted step"),
        ("Run", "hours of the run that was planned"),
        ("Energy", "of the run, its data centre's share included"),
        ("Money", "for the run"),
    ]
    rows = [
        [
            text(p.config),
            text(p.target),
            Cell("", "") if p.chips is None else Cell(f"{p.chips:,}", str(p.chips)),
            figure("step_seconds", p.step_seconds),
            _ratio(c.plan_ratio(p)),
            figure("examples_per_second", p.examples_per_second),
            figure("mfu", p.mfu),
            _amount(p.hours, "h"),
            _amount(p.kwh, "kWh"),
            _amount(p.money, "USD"),
        ]
        for p in c.planned
    ]
    about = '<p class="soft">Predicted by scripts/plan.py, not measured.</p>'
    return f"<h2>Plans</h2>\n{about}\n{table('Plans', heads, rows)}"


def _machines(c: Comparison) -> str:
    """All that a file says of its machine."""
    parts = ["<h2>What was measured where</h2>"]
    for name, result in c.results.items():
        m = result.machine
        load = "not told" if m.load is None else f"{m.load:.2f} processes in the minute before"
        rows = {
            "device": f"{m.device} ({m.platform}), {m.devices} used",
            "host": m.host,
            "driver": m.driver or "says nothing of itself",
            "memory": "not told" if m.memory is None else words.number("memory", m.memory),
            "load": load,
            "price": "not given" if m.price is None else f"{m.price:g} USD an hour, as given",
            "suite": f"version {result.suite}; times are given up above a spread of "
            f"{100 * result.noise:.0f}%",
            "measured": result.date,
        }
        rows |= {
            str(key): value if isinstance(value, str) else json.dumps(value)
            for key, value in result.environment.items()
        }
        body = "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in rows.items()
        )
        parts.append(f"<details><summary>{html.escape(name)}</summary><dl>{body}</dl></details>")
    return "\n".join(parts)


def _meanings(_: Comparison) -> str:
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(kind.words)}"
        f"{f', {kind.unit}' if kind.unit else ''}</dd>"
        for name, kind in FIGURES.items()
    )
    return (
        "<h2>How to read it</h2>\n"
        "<p>A ratio is of medians over rounds of steps; its interval holds 95% of "
        "bootstrap draws of the rounds of both machines. It tells the scatter within a "
        "measurement, not how a machine differs from day to day. Where rounds lie further apart "
        "than the suite's threshold, the machine was too noisy and the time is unavailable.</p>\n"
        f"<details><summary>Every figure</summary><dl>{rows}</dl></details>"
    )
