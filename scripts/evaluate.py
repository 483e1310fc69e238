"""Evaluates a run's newest checkpoint on a split."""

import dataclasses
import json
from pathlib import Path

import tyro

from research import checkpoint, command, run, setup

USAGE = "python scripts/evaluate.py RUN --split SPLIT [--json FILE]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """A run directory."""
    split: str = "test"
    step: int | None = None
    """The checkpoint's step; None: the newest."""
    json: Path | None = None
    """Also write {"step", "split", "metrics"} to this file."""
    allow: tuple[str, ...] = ()
    """Further packages whose classes the run's config.json may name."""


def main() -> None:
    options = command.parse(Options, USAGE)
    with command.one_line_errors():
        run.read(options.run, "config.json")
        ready = setup.prepare(command.load(options.run, options.allow))
        run.check_data(options.run, ready.fingerprint)
        setup.find(ready.splits, options.split)
        saved = options.run / "checkpoints"
        step, state = checkpoint.read(saved, options.step, ready.abstract, ready.shardings)
        rows = ready.evaluate(state, options.split)
    for row, metrics in rows.items():
        found = {"step": step, "split": row, "metrics": metrics}
        print(json.dumps(found, allow_nan=False))
    if options.json:
        found = {"step": step, "split": options.split, "metrics": rows[options.split]}
        options.json.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
