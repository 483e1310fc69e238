"""Figures of a comparison: ratios, times to the target, and each machine's roofline."""

import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullFormatter

from research.bench.comparison import Comparison
from research.bench.result import Figure, Row
from research.plot import COLOURS, STYLES, plain

_MARKERS = "osD^vPX"
_WIDTH = 3.9
"""Inches: a phone's."""
_TEXT: Any = {"svg.fonttype": "none", "font.size": 8.5}
"""Text stays text in an SVG: searchable, and set in the reader's font."""


def drawings(c: Comparison) -> dict[str, Drawing]:
    """By the names that files get."""
    found = {"speed": _speed(c), "target": _target(c)}
    for machine in c.results:
        found[f"roofline_{re.sub(r'[^A-Za-z0-9._-]+', '-', machine)}"] = _roofline(c, machine)
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def save(c: Comparison, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes each as SVG and as PDF; the folder is created."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, drawing in drawings(c).items():
        for suffix in (".svg", ".pdf"):
            written.append(folder / f"{name}{suffix}")
            with matplotlib.rc_context(_TEXT):
                drawing.savefig(written[-1])
    return written


def inline(drawing: Drawing, words: str) -> str:
    """An SVG element whose colours are the page's, which has a light and a dark set.

    words: what a reader hears who does not see it.
    """
    out = io.StringIO()
    with matplotlib.rc_context(_TEXT):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.savefig(out, format="svg", transparent=True, metadata=none)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("#000000", "var(--ink)").replace("#4d4d4d", "var(--ink)")
    svg = svg.replace("#e5e5e5", "var(--line)").replace("#e6e6e6", "var(--line)")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour.lower(), f"var(--c{i})")
    # Every drawing numbers its parts from 1, and a page has several.
    svg = re.sub(r' id="(?:figure|patch|axes|matplotlib\.axis|xtick|ytick|line2d|text|legend|'
                 r'PathCollection|LineCollection)_\d+"', "", svg)  # fmt: skip
    return svg.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)


def _speed(c: Comparison) -> Drawing | None:
    found = {
        machine: {model: c.ratio(machine, model) for model in c.models} for machine in c.results
    }
    hollow = set()
    for p in c.planned:
        ratio = c.plan_ratio(p)
        matched = c.matching(p)
        if ratio.value is not None and matched is not None:
            hollow.add(f"{p.target}, planned")
            found.setdefault(f"{p.target}, planned", {})[matched.name] = ratio
    known = [m for m in c.models if any(m in row and row[m].value for row in found.values())]
    label = f"times as fast as {c.baseline}; 95% intervals"
    label += ",\nof plans the least and the most" if hollow else ""
    return _dots(known, found, label, hollow, one=True)


def _target(c: Comparison) -> Drawing | None:
    found = {
        machine: {model: c.figure(machine, model, "target_seconds") for model in c.models}
        for machine in c.results
    }
    return _dots(c.models, found, "seconds in steps to the target", set())


def _dots(
    models: Sequence[str],
    found: Mapping[str, Mapping[str, Figure]],
    label: str,
    hollow: set[str],
    one: bool = False,
) -> Drawing | None:
    """A line for each model and, within it, one for each machine; None where nothing is known.

    one: with a line at 1.
    """
    values = [f.value for row in found.values() for f in row.values() if f.value is not None]
    if not values:
        return None
    with matplotlib.rc_context(_TEXT):
        height = 0.17 * len(models) * (len(found) + 0.8) + 0.24 * len(found) + 0.7
        drawing = Drawing(figsize=(_WIDTH, height), layout="constrained")
        axis = drawing.subplots()
        if one:
            axis.axvline(1, color="0.3", linewidth=0.8)
        keys = []
        for k, (machine, row) in enumerate(found.items()):
            colour, marker = COLOURS[k % len(COLOURS)], _MARKERS[k % len(_MARKERS)]
            face = "none" if machine in hollow else colour
            for i, model in enumerate(models):
                figure = row.get(model)
                if figure is None or figure.value is None:
                    continue
                y = i + 0.8 * ((k + 0.5) / len(found) - 0.5)
                if figure.low is not None and figure.high is not None:
                    axis.plot([figure.low, figure.high], [y, y], color=colour, linewidth=1.6)
                axis.plot([figure.value], [y], marker, color=colour, mfc=face, markersize=5)
            keys.append(Line2D([], [], linestyle="", marker=marker, color=colour, mfc=face))
        axis.set(xscale="log", xlabel=label, ylim=(len(models) - 0.5, -0.5))
        axis.set_yticks(range(len(models)), models)
        for edge in range(1, len(models)):
            axis.axhline(edge - 0.5, color="0.9", linewidth=0.6)
        _few(axis)
        drawing.legend(keys, list(found), loc="outside upper left", frameon=False, ncols=1)
    return drawing


def _few(axis: Axes) -> None:
    """A grid and plain numbers on the logarithmic axis across, however short it is."""
    plain(axis)
    low, high = axis.get_xlim()
    subs = (1,) if high > 100 * low else (1, 2, 5)
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    short = high < 3 * low
    axis.xaxis.set_minor_formatter(FormatStrFormatter("%g") if short else NullFormatter())


def _roofline(c: Comparison, machine: str) -> Drawing | None:
    """FLOP/s reached over FLOPs a byte, below the roofs of the device; None without a roof."""
    result = c.results[machine]
    points = [(row, p) for row in result.rows if (p := point(row)) is not None]
    if not result.roofs:
        return None
    ridges = [roof.flops / roof.bandwidth for roof in result.roofs]
    across = [*ridges, *(x for _, (x, _) in points)]
    low, high = min(across) / 4, max(across) * 4
    with matplotlib.rc_context(_TEXT):
        drawing = Drawing(figsize=(_WIDTH, 3.5), layout="constrained")
        axis = drawing.subplots()
        for roof, ridge, style in zip(result.roofs, ridges, STYLES, strict=False):
            ys = [low * roof.bandwidth, roof.flops, roof.flops]
            axis.plot([low, ridge, high], ys, style, color="0.3", label=roof.source)
        for row, (x, y) in points:
            k = c.models.index(row.name)
            colour, marker = COLOURS[k % len(COLOURS)], _MARKERS[k % len(_MARKERS)]
            axis.plot([x], [y], marker, color=colour, markersize=6, label=row.name)
        axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte of main memory", ylabel="FLOP/s")
        axis.set_title(f"{machine}: {result.machine.device}", fontsize="medium", loc="left")
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_minor_formatter(NullFormatter())
        _few(axis)
        drawing.legend(loc="outside lower left", frameon=False, ncols=3, columnspacing=1)
    return drawing


def point(row: Row) -> tuple[float, float] | None:
    """Where a step stands: FLOPs executed a byte of main memory, and FLOP/s reached."""
    if row.failed or row.intensity is None:
        return None
    flops, seconds = (row.figures[k].value for k in ("executed_flops", "step_seconds"))
    return None if flops is None or seconds is None else (row.intensity, flops / seconds)
