"""Prints finished runs side by side."""

import dataclasses
from pathlib import Path

import tyro

from research import command, run

USAGE = "python scripts/table.py RUN [RUN ...]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""


def main() -> None:
    options = command.parse(Options, USAGE)
    if not options.runs:
        command.fail(f"name one run or more: {USAGE}")
    with command.one_line_errors():
        print(run.table([run.summary(path) for path in options.runs]))


if __name__ == "__main__":
    main()
