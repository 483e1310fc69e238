"""Learning curves of runs, drawn from their `metrics.jsonl`, a step on the roofline, and ranks."""

import difflib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from research import UserError
from research.compute import Report
from research.compute import roofline as roofs

# Okabe and Ito's colours, told apart by colour-blind readers; without yellow, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":")
_XLABELS = {"step": "training steps", "seconds": "training time (s)"}
_UNITS = {"accuracy": "accuracy (fraction correct)"}


def curves(
    runs: Sequence[Path],
    out: Path,
    metrics: Sequence[str] | None = None,
    x: Literal["step", "seconds"] = "step",
) -> Path:
    """Draw one panel per metric with a line per run; return `out`.

    Evaluation splits are solid lines (dashed from the second one on), "train" is thin and pale.

    Args:
        runs: Run directories.
        out: A `.png` or `.svg` file; its directory is created.
        metrics: Panels, in order; by default the metrics all runs have, loss first, at most 6.
        x: Horizontal axis: training steps or seconds.

    Raises UserError for another suffix, a run without rows, or a metric some run lacks.
    """
    out = image(out)
    if x not in _XLABELS:
        raise UserError(f"x is {x!r}; use 'step' or 'seconds'")
    runs = list({Path(run).resolve(): Path(run) for run in runs}.values())
    if not runs:
        raise UserError("no runs to plot; give at least one run directory")
    series = [_read(run, x) for run in runs]
    panels = list(metrics or _shared(series))
    for run, lines in zip(runs, series, strict=True):
        known = sorted({metric for metric, _ in lines})
        for metric in panels:
            if metric not in known:
                close = difflib.get_close_matches(metric, known, 1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise UserError(f"{run}: no metric {metric!r}; {hint}it has {', '.join(known)}")
    if not panels:
        raise UserError("the runs share no metric; plot them one at a time")

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    down = math.ceil(len(panels) / columns)
    names = [name.replace("$", r"\$") for name in _names(runs)]
    width = 4.2 * columns + 0.4
    across = max(1, min(len(names), int(width / (0.085 * max(map(len, names)) + 0.6))))
    height = 2.9 * down + 0.22 * math.ceil(len(names) / across) + 0.6
    splits = sorted(
        {split for lines in series for _, split in lines}, key=lambda s: (s != "train", s)
    )
    styles = itertools.cycle(STYLES)
    drawn: dict[str, dict[str, Any]] = {
        split: {"linewidth": 0.9, "alpha": 0.5, "zorder": 2}
        if split == "train"
        else {"linewidth": 1.8, "linestyle": next(styles), "zorder": 3}
        for split in splits
    }
    # Text stays text in an SVG: searchable, and set in the reader's font.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
        axes = figure.subplots(down, columns, squeeze=False).flat
        for axis, metric in itertools.zip_longest(axes, panels):
            if metric is None:
                axis.set_axis_off()
                continue
            for colour, lines in zip(_colours(len(runs)), series, strict=True):
                for (found, split), (xs, ys) in lines.items():
                    if found == metric:
                        marker = "o" if len(xs) == 1 else None
                        axis.plot(xs, ys, color=colour, marker=marker, **drawn[split])
            axis.set_xlabel(_XLABELS[x])
            axis.set_ylabel(_UNITS.get(metric, metric).replace("$", r"\$"))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=x == "step"))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            plain(axis)
        keys = [
            Line2D([], [], color=c, linewidth=1.8, label=name)
            for c, name in zip(_colours(len(runs)), names, strict=True)
        ]
        figure.legend(keys, names, loc="outside lower center", ncols=across, frameon=False)
        keys = [Line2D([], [], color="0.3", **drawn[split]) for split in splits]
        figure.legend(keys, splits, loc="outside upper right", ncols=len(keys), frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    return out


def roofline(report: Report, out: Path) -> Path:
    """Draw a compiled step's modules, and the step, under the roofs of its device; return `out`.

    A module stands at its own FLOPs a byte, at the rate that the roof allows there; its area is its
    share of the executed FLOPs. Where the step was measured, it stands at the rate reached.

    Raises UserError for another suffix, and for a device of which no rate is known.
    """
    out = image(out)
    if report.program is None or not report.rates:
        raise UserError(
            "no rates are known for this device: run scripts/benchmark.py peaks, or use one that "
            "chips.toml has"
        )
    if not report.program.by_dtype:
        raise UserError("this step executes no matrix products: there is nothing to draw")
    run, total = report.program, max(report.program.matmul_flops, 1)
    points = {m: (f / b, f) for m, (f, b) in run.by_module.items() if f and b}
    points = dict(sorted(points.items(), key=lambda item: -item[1][1])[: len(COLOURS)])
    moved = run.bytes_by_space.get(0, 0)
    step = total / max(moved, 1)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(7.6, 4.4))
        figure.set_layout_engine("constrained")
        axis = figure.subplots()
        intensities = [step, *(x for x, _ in points.values())]
        heights = []
        for rates, line in zip(report.rates, STYLES, strict=False):
            ideal = roofs.compute_seconds(run.by_dtype, rates)
            if not ideal:
                continue
            peak, bandwidth = total / ideal, rates.bandwidth(moved)
            low = min(*intensities, peak / bandwidth) / 3
            high = max(*intensities, peak / bandwidth) * 3
            xs = [low, peak / bandwidth, high]
            label = f"{rates.device}, {rates.source}"
            axis.plot(xs, [low * bandwidth, peak, peak], line, color="0.3", label=label)
            heights.append((peak, bandwidth))
        if not heights:
            raise UserError(f"no peak is known for {', '.join(run.by_dtype)} on this device")
        peak, bandwidth = heights[-1]
        for (module, (x, flops)), colour in zip(points.items(), COLOURS, strict=False):
            area = 20 + 400 * flops / total
            y = min(peak, x * bandwidth)
            axis.scatter([x], [y], s=area, color=colour, alpha=0.7, label=module or "(no module)")
        y = min(peak, step * bandwidth)
        axis.plot([step], [y], "k*", markersize=12, label="the step, at best")
        if report.seconds:
            axis.plot([step], [total / report.seconds], "kx", markersize=9, label="as measured")
        axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte of main memory", ylabel="FLOP/s")
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter(EngFormatter(sep=""))
        plain(axis)
        figure.legend(loc="outside right upper", frameon=False, fontsize="small", markerscale=0.6)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    return out


def dots(
    panels: Mapping[str, Sequence[tuple[str, Sequence[float | None], str]]], out: Path
) -> Path:
    """Draw a panel for each quantity, on a log scale: a line for each name; return `out`.

    Args:
        panels: By the axis's label, from the top: a name, its positive values, each a small circle,
            and a note, which stands in place of their mean where it is not empty.
        out: A `.png` or `.svg` file; its directory is created.

    Raises UserError for another suffix.
    """
    out = image(out)
    rows = max(map(len, panels.values()))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(4.9 * len(panels), 0.27 * rows + 1.1))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
        for axis, (label, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True
        ):
            for y, (_, values, note) in enumerate(lines):
                found = [value for value in values if value is not None]
                axis.scatter(found, [y] * len(found), s=26, facecolors="none", edgecolors="0.45")
                if note:
                    across = axis.get_yaxis_transform()
                    axis.text(0.02, y, note, transform=across, va="center", fontsize=8)
                else:
                    mean = sum(found) / len(found)
                    axis.plot([mean], [y], "|", color=COLOURS[0], markersize=13, markeredgewidth=3)
            axis.set(xscale="log", xlabel=label, ylim=(len(lines) - 0.5, -0.5))
            axis.set_yticks(range(len(lines)), [name for name, _, _ in lines])
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            low, high = axis.get_xlim()
            narrow = high < 2 * low
            axis.xaxis.set_minor_locator(LogLocator(subs=range(1, 10)) if narrow else NullLocator())
            axis.xaxis.set_minor_formatter(FormatStrFormatter("%g"))
            plain(axis)
        keys = [
            Line2D([], [], linestyle="", marker="o", markerfacecolor="none", color="0.45"),
            Line2D([], [], linestyle="", marker="|", color=COLOURS[0], markeredgewidth=3),
        ]
        keys[1].set_markersize(13)
        figure.legend(keys, ["a seed", "mean"], loc="outside upper right", ncols=2, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
    return out


def image(out: Path) -> Path:
    """`out`, where its suffix is of a picture that is drawn here. Raises UserError elsewhere."""
    out = Path(out)
    if out.suffix.lower() not in (".png", ".svg"):
        raise UserError(
            f"{out}: cannot write {out.suffix or 'a file without suffix'}; use .png or .svg"
        )
    return out


def plain(axis: Axes) -> None:
    axis.grid(color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _read(run: Path, x: str) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Points (x, y) by metric and split."""
    path = run / "metrics.jsonl"
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; give the run directory of a training run")
    if not path.is_file():
        raise UserError(f"{run}: no metrics.jsonl; give the run directory of a training run")
    *lines, tail = path.read_text("utf-8", errors="replace").split("\n")
    points: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for number, line in enumerate([*lines, tail], 1):
        try:
            row = json.loads(line)
            at, split = float(row[x]), str(row["split"])
            values = {k: float(v) for k, v in row.items() if k not in ("step", "split", "seconds")}
        except (ValueError, KeyError, TypeError):
            if number > len(lines):  # cut short by a killed process
                continue
            raise UserError(f"{path}, line {number}: not a metrics row") from None
        for metric, value in values.items():
            xs, ys = points.setdefault((metric, split), ([], []))
            xs.append(at)
            ys.append(value)
    if not points:
        raise UserError(f"{path}: no metrics yet; let the run write a row first")
    return points


def _shared(series: Sequence[dict[tuple[str, str], Any]]) -> list[str]:
    found = [dict.fromkeys(metric for metric, _ in lines) for lines in series]
    shared = [metric for metric in found[0] if all(metric in other for other in found)]
    return sorted(shared, key=lambda metric: metric != "loss")[:6]


def _names(runs: Sequence[Path]) -> list[str]:
    """Each run's shortest trailing path that no other run has."""
    paths = [run.resolve().parts for run in runs]
    return [
        str(
            Path(
                *next(
                    mine[-k:]
                    for k in itertools.count(1)
                    if sum(other[-k:] == mine[-k:] for other in paths) == 1
                )
            )
        )
        for mine in paths
    ]


def _colours(count: int) -> list[Any]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["viridis"]([i / count for i in range(count)]))
