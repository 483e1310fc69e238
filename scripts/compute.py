"""Prints what a config's step costs: as written, as compiled, and on this machine's device."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from research import command, compute, flags, plot, setup
from research.bench import loop

USAGE = "python scripts/compute.py CONFIG [--json FILE] [--plot FILE] [--field value ...]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(command.Options):
    json: Path | None = None
    """Also write the figures to this file."""
    plot: Path | None = None
    """Also draw the step's modules on the device's roofline, in this .png or .svg."""
    trace_only: bool = False
    """Count what is written, and compile nothing."""
    measure: Annotated[int, Ge(0)] = 0
    """Steps to run, which gives MFU and HFU."""


def main() -> None:
    flags.apply(os.environ)
    options = command.parse(Options, USAGE)
    if options.trace_only and (options.plot or options.measure):
        command.fail("--plot and --measure need the compiled step: leave out --trace_only")
    with command.one_line_errors():
        ready = setup.prepare(options.experiment)
        traced = ready.step().trace(*ready.abstract_example())
        if options.trace_only:
            found = compute.Report(count=compute.count(traced))
        else:
            step = traced.lower().compile()
            found = compute.report(
                traced, compiled=step, mesh=ready.mesh, reference=ready.reference()
            )
        if options.measure:
            found = found.after(loop.bare(ready, step, options.measure, chunk=1))
        if options.plot:
            plot.roofline(found, options.plot)
    print(found)
    command.write_json(options.json, found.json())


if __name__ == "__main__":
    main()
