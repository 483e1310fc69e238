"""Evaluates a run's newest checkpoint on a split."""

import dataclasses
import json
from pathlib import Path

import tyro

from research import checkpoint, command, hosts, run, setup
from research.parallel import Parallel

USAGE = "python scripts/evaluate.py RUN --split SPLIT [--json FILE]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    run: tyro.conf.Positional[Path]
    """A run directory."""
    split: str = "test"
    step: int | None = None
    """The checkpoint's step; None: the newest."""
    best: bool = False
    """The best checkpoint, of a run that kept it, in place of the newest."""
    confusion: bool = False
    """Print the confusion matrix of more than 20 classes too."""
    json: Path | None = None
    """Also write {"step", "split", "metrics", "tables"} to this file, and under "ema" what the
    moving average of the parameters reaches."""
    parallel: Parallel = Parallel()
    """The mesh; where none of it is given, the one that the run was trained on."""
    allow: tuple[str, ...] = ()
    """Further packages whose classes the run's config.json may name."""


def main() -> None:
    with command.one_line_errors(), hosts.session():
        evaluate()


def evaluate() -> None:
    options = command.parse(Options, USAGE)
    run.read(options.run, "config.json")
    experiment = command.load(options.run, options.allow)
    if options.parallel != Parallel():
        experiment = dataclasses.replace(experiment, parallel=options.parallel)
    ready = setup.prepare(experiment)
    run.check_data(options.run, ready.fingerprint)
    setup.find(ready.splits, options.split)
    saved = options.run / "checkpoints"
    step, state = checkpoint.read(saved, options.step, ready.abstract, ready.shardings)
    if options.best:
        step = run.best(options.run, ready.experiment.early_stop.best(state.stop))
        _, state = checkpoint.read(saved, step, ready.abstract, ready.shardings)
    rows = ready.report(state, options.split)
    for row, (metrics, tables) in rows.items():
        print(json.dumps({"step": step, "split": row, "metrics": metrics}, allow_nan=False))
        for name, table in tables.items():
            if len(table) <= 20 or options.confusion:
                print(run.matrix(name, table))
    first, *averaged = (found._asdict() for found in rows.values())
    found = {"step": step, "split": options.split, **first}
    if averaged:
        found["ema"] = averaged[0]
    command.write_json(options.json, found)


if __name__ == "__main__":
    main()
