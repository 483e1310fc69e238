"""Puts measurements of machines, and plans for others, side by side: a table, a page, figures."""

import dataclasses
import sys
from pathlib import Path

import tyro

from research import command
from research.bench import comparison, drawing, page, tables

USAGE = (
    "python scripts/compare.py FILE [FILE ...] [--baseline NAME] [--html FILE] [--csv FILE] "
    "[--figures DIR]"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Of `scripts/benchmark.py suite --out` and of `scripts/plan.py --json`."""
    baseline: str | None = None
    """The machine that others are compared with: its file's name without .json; by default the
    first measured."""
    html: Path | None = None
    """Also write a page that needs nothing else."""
    csv: Path | None = None
    """Also write every figure, with how it was got."""
    figures: Path | None = None
    """Also draw them, as SVG and PDF, in this folder."""


def main() -> None:
    options = command.parse(Options, USAGE)
    if not options.files:
        command.fail(f"name one file or more: {USAGE}")
    with command.one_line_errors():
        found = comparison.read(options.files, options.baseline)
        for line in found.warnings:
            print(line, file=sys.stderr)
        print(tables.text(found))
        if options.html:
            options.html.write_text(page.html_page(found), encoding="utf-8")
        if options.csv:
            options.csv.write_text(tables.to_csv(found), encoding="utf-8")
        if options.figures:
            drawing.save(found, options.figures)


if __name__ == "__main__":
    main()
