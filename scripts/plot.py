"""Draws the learning curves of runs, side by side."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from research import command, plot

USAGE = "python scripts/plot.py RUN [RUN ...] [--out curves.png]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("curves.png")
    """The figure: .png or .svg."""
    metrics: tuple[str, ...] = ()
    """Metrics to draw; by default those all runs have, at most 6."""
    x: Literal["step", "seconds"] = "step"
    """Horizontal axis."""


def main() -> None:
    options = command.parse(Options, USAGE)
    with command.one_line_errors():
        print(plot.curves(options.runs, options.out, options.metrics, options.x))


if __name__ == "__main__":
    main()
