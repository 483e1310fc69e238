"""Figures of a benchmark as text, in the units that a person reads."""

from research import run
from research.bench.result import FIGURES, Figure, Result

_MARKS = {"estimated": "~", "upper bound": "<", "lower bound": ">"}
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1.0, "B")),
}
_LARGE = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(name: str, value: float) -> str:
    """A value of a figure of FIGURES with its unit."""
    kind = FIGURES[name]
    if kind.unit == "share":
        return f"{100 * value:.1f}%"
    if kind.unit in _SCALES:
        scales = _SCALES[kind.unit]
        size, unit = next((s for s in scales if abs(value) >= s[0]), scales[-1])
        return f"{digits(value / size)} {unit}"
    if kind.unit == "FLOP":
        return f"{scaled(value)}FLOP"
    if kind.unit == "1/s":
        return digits(value)
    return f"{digits(value)} {kind.unit}".rstrip()


def scaled(value: float) -> str:
    """A number and the prefix of a unit, of thousands of millions and such."""
    size, prefix = next((s for s in _LARGE if value >= s[0]), (1.0, ""))
    return f"{digits(value / size)} {prefix}"


def digits(value: float) -> str:
    """Three significant digits, and all of those before the point."""
    if value and abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shown(name: str, figure: Figure) -> str:
    """A figure, marked where it is a bound or an estimate; "-" where there is none."""
    if figure.value is None:
        return "-"
    return marked(figure, number(name, figure.value))


def marked(figure: Figure, shown: str) -> str:
    """A figure's text, where it is a bound or an estimate marked so."""
    return _MARKS.get(figure.qualifier, "") + shown


def ends(name: str, figure: Figure) -> str:
    """Its interval, where it has one."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{number(name, figure.low)} to {number(name, figure.high)}"


def times(ratio: Figure) -> str:
    return "-" if ratio.value is None else f"{ratio.value:.3g}x"


def times_ends(ratio: Figure) -> str:
    if ratio.low is None or ratio.high is None:
        return ""
    return f"{ratio.low:.3g} to {ratio.high:.3g}"


def table(result: Result) -> str:
    """Of one machine, as text."""
    head = (
        "model", "FLOPs/step", "step", "95%", "p95", "examples/s", "MFU", "HFU", "wait",
        "memory", "compile", "first step", "to target", "energy",
    )  # fmt: skip
    rows = []
    for row in result.rows:
        if row.failed:
            rows.append((row.name, "failed", *[""] * (len(head) - 2)))
            continue
        f = row.figures
        measured = "" if f["mfu"].value is not None else "_measured"
        rows.append(
            (
                row.name,
                shown("model_flops", f["model_flops"]),
                shown("step_seconds", f["step_seconds"]),
                ends("step_seconds", f["step_seconds"]),
                shown("step_p95", f["step_p95"]),
                shown("examples_per_second", f["examples_per_second"]),
                shown("mfu", f["mfu" + measured]),
                shown("hfu", f["hfu" + measured]),
                shown("input_wait", f["input_wait"]),
                shown("memory", f["memory"]),
                shown("compile_seconds", f["compile_seconds"]),
                shown("first_step_seconds", f["first_step_seconds"]),
                shown("target_seconds", f["target_seconds"]),
                shown("target_joules", f["target_joules"]),
            )
        )
    lines = [run.aligned([head, *rows], left={0})]
    lines += [f"{row.name}: {row.failed}" for row in result.rows if row.failed]
    reasons: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for row in result.rows:
        for name, figure in row.figures.items():
            if figure.value is None:
                models, names = reasons.setdefault(figure.how, ({}, {}))
                models[row.name] = names[name] = None
    for reason, (models, names) in reasons.items():
        first, more = ", ".join(list(names)[:3]), len(names) - 3
        what = first + (f" and {more} more" if more > 0 else "")
        lines.append(f"{', '.join(models)}: {what} unavailable: {reason}")
    return "\n".join(lines)
