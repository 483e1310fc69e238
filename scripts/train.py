"""Trains an experiment in a run directory, or continues it."""

import dataclasses
import os
import pathlib
import sys
from typing import Annotated

import tyro

from research import command, flags, hosts, placement, run, setup, train

USAGE = "python scripts/train.py CONFIG [--workdir DIR] [--field value ...]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    workdir: pathlib.Path | None = None
    """The run directory; None: runs/ and the config's name."""
    profile: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Write an xprof trace of N steps into the run directory, after two that warm up."""
    require_target: bool = False
    """Exit with status 1 where the run misses its target."""
    explain: bool = False
    """Print where every parameter is put and its bytes on a device, and stop."""


def main() -> None:
    flags.apply(os.environ)
    with command.one_line_errors(), hosts.session():
        train_as_asked()


def train_as_asked() -> None:
    options = command.parse(Options, USAGE)
    if options.profile < 0:
        command.fail(f"--profile must be a number of steps, not {options.profile}")
    workdir = options.workdir or pathlib.Path("runs") / command.name(options.config)
    ready = setup.prepare(options.experiment)
    if options.explain:
        print(placement.explained(ready))
        return
    summary = train.train(ready, workdir, options.profile)
    print(run.table([summary]))
    if summary.met is False:
        print(f"{workdir} missed its target: {summary.target}, reached {summary.reached:.4f}")
        if options.require_target:
            sys.exit(1)


if __name__ == "__main__":
    main()
