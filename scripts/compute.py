"""Prints what a config's step costs; traces it, and compiles nothing."""

import dataclasses
import json
from pathlib import Path

from research import command, setup
from research.compute import count, report

USAGE = "python scripts/compute.py CONFIG [--json FILE] [--field value ...]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    json: Path | None = None
    """Also write the figures to this file."""


def main() -> None:
    options = command.parse(Options, USAGE)
    with command.one_line_errors():
        ready = setup.prepare(options.experiment)
    cost = count(ready.step().trace(*ready.example()))
    print(report.text(cost))
    if options.json:
        options.json.write_text(json.dumps(report.to_json(cost), indent=2) + "\n")


if __name__ == "__main__":
    main()
