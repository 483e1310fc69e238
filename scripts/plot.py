"""Learning curves of runs: python scripts/plot.py RUN [RUN ...] --out curves.png"""

import sys
from pathlib import Path
from typing import Literal

import tyro

from research import plot


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("curves.png"),
    metrics: tuple[str, ...] = (),
    x: Literal["step", "seconds"] = "step",
) -> None:
    """Draw learning curves and print the path of the figure.

    Args:
        runs: Run directories.
        out: Figure to write, .png or .svg.
        metrics: Metrics to draw; by default those all runs have, at most 6.
        x: Horizontal axis.
    """
    try:
        print(plot.curves(runs, out, metrics, x))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    tyro.cli(main)
